"""Reports and figures of a run, from its files. They only read a run's files, also while it is going on."""

from aem_jax.report.headline import plot_headline
from aem_jax.report.page import write_report

__all__ = ["plot_headline", "write_report"]
