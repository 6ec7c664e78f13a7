"""Parts of the command export: sampling as one graph, the files that hold it, and the page that runs it."""
