"""Training multi-turn LLM agents with reinforcement learning in pure JAX, with Adaptive Entropy Modulation (AEM).

Nothing is imported here, so that `import aem_jax.advantage` stays light: jax and nothing else.
"""

__version__ = "0.2.0"
