"""Whether weights have changed."""

import torch
from torch import nn

from coded_torch._weights import fingerprint, unchanged
from coded_torch.codes import ReplicationCode
from coded_torch.nn import CodedWrapper
from coded_torch.surrogates import Memory
from coded_torch.workers import ProcessWorkers


class Walked(nn.Linear):
    """Counts how often its parameters are listed."""

    walks = 0

    def named_parameters(self, *args, **kwargs):
        self.walks += 1
        return super().named_parameters(*args, **kwargs)

    def __reduce__(self):  # the worker's copy
        return nn.Linear, (self.in_features, self.out_features)


def test_a_call_walks_the_weights_once():
    module = Walked(2, 1)
    with ProcessWorkers(2) as pool, torch.no_grad():
        coded = CodedWrapper(module, ReplicationCode(2, 2), workers=pool, surrogate=Memory())
        coded(torch.ones(4, 2))
        module.walks = 0
        coded(torch.ones(4, 2))
    assert module.walks == 1


def test_fingerprints_are_kept_for_a_block_alone():
    module = nn.Linear(2, 1)
    with unchanged():
        before = fingerprint(module)[1]
        with torch.no_grad():
            module.weight.add_(1)
        assert fingerprint(module)[1] == before
    assert fingerprint(module)[1] != before


def test_sparse_weights_that_are_replaced_are_noticed():
    module = nn.Linear(2, 1)
    module.register_buffer("matrix", torch.eye(2).to_sparse())
    kept, before = fingerprint(module)
    assert fingerprint(module)[1] == before
    assert len(kept) == 3
    module.matrix = torch.eye(2).to_sparse()
    assert fingerprint(module)[1] != before
