"""Ray: the cluster, preparation as Ray Data, training as Ray Train; the whole way of one run."""
