"""Text classification: GLUE, datasets of the Hub, files of your own."""
