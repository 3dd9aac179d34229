"""Volumes: files, the raw dataset, preprocessing, the store of slices, splits, what a batch holds, the phantom."""
