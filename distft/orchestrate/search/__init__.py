"""Search on the cluster: Ray Tune over trials, each a training of its own."""
