"""Text classification on GLUE, on datasets of the Hub, or on files of your own."""
