"""The stream: which samples make step t, and how their arrays reach the train worker."""
