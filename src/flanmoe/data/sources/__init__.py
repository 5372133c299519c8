"""Where rows come from: files, installed-package exemplars, Hugging Face data sets."""
