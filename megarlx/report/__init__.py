"""What a folder of runs shows: figures, one page, summary.json; read from the runs' files alone."""
