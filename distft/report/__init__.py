"""What a run came to, for people: ``report.html``, and the short records that lists of runs are made of.

Everything is read from the run's folder, whatever state that is in: a run that goes on, that was killed, whose files
are damaged, or that an older distft wrote is shown as what it is. Neither torch nor Ray is needed.

- :mod:`.facts` reads the folder; :mod:`.verdict` judges it; :mod:`.brief` tells it in one line.
- :mod:`.curves`, :mod:`.search` make :mod:`.charts`; :mod:`.tables` has what is not drawn.
- :mod:`.page` puts them into ``page.html``; :mod:`.compare` does so for several runs.
"""
