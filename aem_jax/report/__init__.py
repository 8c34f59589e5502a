"""Pages and pictures of a run, made from the files that it leaves behind. Nothing here touches a run that is going
on."""

from aem_jax.report.headline import plot_headline
from aem_jax.report.page import write_report

__all__ = ["plot_headline", "write_report"]
