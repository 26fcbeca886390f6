"""Jobs on a remote Ray cluster, through Ray's Jobs API: what is sent, how it starts there, and how it is looked after.

The way of a submitted job: :mod:`~.parcel` packs the job file, the files it names and distft itself; :mod:`~.jobs`
hands that to Ray; Ray unpacks it on a node and calls :mod:`~.driver`, which becomes ``distft run``. That process needs
nobody who watches it. Workers that fail are started again (``cluster.max_failures``); a driver that is lost with its
node is submitted again by its run's name, with ``--resume``: the Jobs API repeats nothing itself.

Secrets are not sent, since Ray shows a job's environment to all who may use the cluster. Tokens and keys (HF_TOKEN,
AWS_SECRET_ACCESS_KEY) belong into the environment of the cluster's nodes, and a job that lacks one says which.
"""
