import copy
import pickle

import numpy as np
import pytest

from coded_torch import codes
from coded_torch.codes import CurveCode, NotEnoughResults, ReplicationCode
from coded_torch.linear import MatrixMap


class Nearest(CurveCode):
    """Every worker gets the first input, and every answer is the first result."""

    def _make_encoder(self):
        return MatrixMap(np.eye(1, self.num_data).repeat(self.num_workers, 0))

    def _curve(self, nodes, points):
        return MatrixMap(np.eye(1, len(nodes)).repeat(len(points), 0))


@pytest.mark.parametrize(("reason", "first"), [("", ""), ("worker 0 fails", "worker 0 fails; ")])
def test_not_enough_results_says_why_and_what_is_missing(reason, first):
    error = NotEnoughResults([4, 1], required=3, num_workers=6, reason=reason)
    text = f"{first}at least 3 of 6 results are needed, got 2; missing: [0, 2, 3, 5]"
    assert (error.received, error.required, error.missing) == ((1, 4), 3, (0, 2, 3, 5))
    for twin in (error, pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert (str(twin), twin.missing, twin.reason) == (text, error.missing, reason)
    assert str(NotEnoughResults([], 3, 1000)).endswith("14, 15] and 984 more")


@pytest.mark.parametrize(
    "text",
    [
        "SplineCode({}, encoder_smoothing=0.0, decoder_smoothing=0.1)",
        "FloaterHormannCode({}, order=2)",
        "LagrangeCode({}, decoder_degree=5)",
        "LagrangeCode({}, degree=1)",
        "ReplicationCode({}, ordering='arrival', shuffle=False)",
    ],
)
def test_a_code_says_the_arguments_that_it_was_given(text):
    text = text.format("num_data=4, num_workers=6")
    code = eval(text, vars(codes))
    assert repr(code) == text
    assert repr(code.replace(num_workers=7)) == text.replace("6", "7")


def test_points_cannot_change_under_the_decoders():
    points = np.array([0.0, 1.0])
    code = Nearest(2, 2, data_points=points, worker_points=points)
    points[0] = 9
    assert code.data_points.tolist() == [0.0, 1.0]
    with pytest.raises(ValueError, match="read-only"):
        code.data_points[0] = 9


@pytest.mark.parametrize(
    ("wrong", "got"),
    [
        ([[1.0]], "list"),
        (np.ones(4), "ndarray"),
        (np.eye(3), r"MatrixMap\(3 -> 3\)"),
        (None, "NoneType"),
    ],
)
def test_what_a_code_of_ones_own_must_return_is_said(wrong, got):
    class Wrong(ReplicationCode):
        def _make_encoder(self):
            return wrong

        def _make_decoder(self, received):
            return wrong

    must = rf"_make_encoder must return a NumPy array \[4, 2\] or .* from 2 to 4, got {got}$"
    with pytest.raises(TypeError, match=f"^Wrong: {must}"):
        _ = Wrong(2, 4).encoder
    with pytest.raises(TypeError, match=r"^Wrong: _make_decoder must return .* from 4 to 2, got"):
        Wrong(2, 4).decoder(range(4))


def test_the_rows_of_matrices_of_ones_own_must_sum_to_1(monkeypatch):
    class Twice(ReplicationCode):
        def _make_encoder(self):
            return 2 * np.eye(4, 2)

        def _make_decoder(self, received):
            return np.array([[1e9, 1.0 - 1e9], [1.0, 0.0]])  # rounding grows with the numbers

    with pytest.raises(ValueError, match=r"^Twice: the rows of _make_encoder's .* must sum to 1"):
        _ = Twice(2, 4).encoder
    monkeypatch.setattr(Twice, "_make_encoder", lambda _: np.full((4, 2), "a"))
    with pytest.raises(TypeError, match="matrix must be real numbers"):
        _ = Twice(2, 4).encoder
    assert Twice(2, 4).decoder([0, 1]).num_inputs == 2
