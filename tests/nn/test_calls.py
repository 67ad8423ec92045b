"""The wrapper keeps the promises of calls."""

from coded_torch.testing.calls import CallTests


class TestCodedWrapper(CallTests):
    pass
