"""One import into other people's trainers: the loss of ``trsd_kernels`` where theirs stands, and our cuts as data."""
