"""Image classification: datasets of the Hub or on disk, folders of images, streams."""
