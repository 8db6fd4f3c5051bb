"""Everything between the trainer and the SGLang servers. Import the modules, not this package."""
