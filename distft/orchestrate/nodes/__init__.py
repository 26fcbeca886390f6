"""Whether the nodes of a cluster can work together: what each says, what is wrong with it, and how to mend that.

:mod:`.survey` asks the nodes through Ray, :mod:`.findings` judges what they say and knows no Ray, and
:mod:`.check` does both before a run's workers start.
"""
