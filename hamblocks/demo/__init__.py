"""The main job: what a HAM layer buys on real text, measured on the machine it runs on."""

from hamblocks.demo.corpus import Corpus
from hamblocks.demo.experiment import Growth, Results, Run, Settings, run
from hamblocks.demo.report import chart, table

__all__ = ["Corpus", "Growth", "Results", "Run", "Settings", "chart", "run", "table"]
