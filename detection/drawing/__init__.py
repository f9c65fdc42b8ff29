"""Drawing of boxes, figures, windows and HTML pages, independent of datasets and models."""
