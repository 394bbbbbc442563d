"""Images to batches: stores, the loader, views, augmentation kernels."""
