"""From files on disk to batches on the device: decoding, readers, views, bad images, loading."""
