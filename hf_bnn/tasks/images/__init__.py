"""Image classification on datasets of the Hub or on disk, folders of images, or streams."""
