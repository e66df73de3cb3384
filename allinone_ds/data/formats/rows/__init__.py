"""Formats whose samples are rows with columns: tables of `datasets`, and tar files of the webdataset format."""
