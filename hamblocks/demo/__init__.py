"""The demo: trains small models on real text and measures what they store and predict."""

from hamblocks.demo.corpus import Corpus
from hamblocks.demo.experiment import Growth, Results, Run, Settings, run
from hamblocks.demo.report import chart, table

__all__ = ["Corpus", "Growth", "Results", "Run", "Settings", "chart", "run", "table"]
