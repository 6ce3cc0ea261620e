"""Reports: tables and figures made from arrays and result files.  Nothing here imports torch."""
