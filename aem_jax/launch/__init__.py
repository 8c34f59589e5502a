"""The commands of `python -m aem_jax.launch`: train, evaluate, analyze, export, serve, and the rest."""
