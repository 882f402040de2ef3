"""Training tasks for the command line: text and image classification. They need the extra `scripts`."""
