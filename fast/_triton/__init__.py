"""What several kernels share: where they run, how a result is rounded, the steps of an online softmax."""
