"""Sentence embeddings from three servers, one of which is wrong and one dies."""

import contextlib
import itertools
import os
import random
import signal
import threading
import zlib

import pytest
import torch
from torch import nn

from coded_torch import CodedWrapper
from coded_torch.open_inference import _client
from coded_torch.serve import App, specs
from coded_torch.testing.helpers import until
from coded_torch.workers import DeviceWorkers, EndpointWorkers, RemoteModule

from .servers import serving
from .test_command import running

ROWS = 2000
STEP = 50  # rows of a call
WORDS = ["a", "good", "bad", "film", "play", "with", "no", "the", "end", "of", "it", "and"]
MODEL = f"""
import sys
sys.path.append({os.getcwd()!r})
from tests.serve.test_fleet_of_sentences import Sentences

EXAMPLES = ["a good film", "a bad play"]

def right():
    return Sentences(), EXAMPLES

def wrong():
    return Sentences(wrong=0.2), EXAMPLES
"""


class Sentences(nn.Module):
    """Embeds sentences by its own tokenizer, some of them wrongly."""

    def __init__(self, wrong=0.0):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.words = nn.EmbeddingBag(512, 32, _weight=torch.randn(512, 32, generator=generator))
        self.wrong = wrong

    def forward(self, texts):
        tokens = [[zlib.crc32(word.encode()) % 512 for word in text.split()] for text in texts]
        first = torch.tensor([0, *map(len, tokens[:-1])]).cumsum(0)
        found = nn.functional.normalize(
            self.words(torch.tensor([*itertools.chain(*tokens)]), first), dim=1
        )
        draws = torch.tensor([zlib.adler32(text.encode()) % 100 for text in texts])
        is_wrong = draws < 100 * self.wrong
        found[is_wrong] = found[is_wrong].roll(1, 1)
        return found


class Dying:
    """An application that breaks each connection once it is told to."""

    def __init__(self, application):
        self.application = application
        self.is_dead = False

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan" or not self.is_dead:
            await self.application(scope, receive, send)
            return
        head = {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-length", b"9")],
        }
        await send(head)
        raise ConnectionError


def application(wrong=0.0):
    coded = CodedWrapper(Sentences(wrong), workers=DeviceWorkers(["cpu"]))
    inputs, outputs = specs(Sentences(), WORDS)
    return App(coded, name="m", inputs=inputs, outputs=outputs, examples=WORDS, deadline=20.0)


def embed(urls, die):
    """Return how many of the rows are wrong, and how many are lost, if a server dies."""
    draws = random.Random(0)
    texts = [" ".join(draws.choices(WORDS, k=draws.randint(1, 9))) for _ in range(ROWS)]
    wanted = Sentences()(texts).detach()
    wrong = 0
    lost = 0
    random.shuffle(urls)
    with EndpointWorkers(urls, model="m") as pool, torch.no_grad():
        coded = CodedWrapper(RemoteModule(urls[0], "m"), workers=pool, verify=0.1)
        is_excluded = False
        for first in range(0, ROWS, STEP):
            rows = slice(first, first + STEP)
            answers, report = coded.run(texts[rows])
            wrong += int(((answers - wanted[rows]).abs().amax(1) > 1e-5).sum())
            lost += len(report.missing_rows)
            if report.excluded:  # two servers alone could not tell who of them is wrong
                is_excluded = True
                die()
    return wrong, lost, is_excluded


@pytest.mark.parametrize("share", [1.0, 0.2])
def test_no_row_is_wrong_and_none_is_lost(share):
    dying = Dying(application())
    with contextlib.ExitStack() as held:
        apps = [application(), application(share), dying]
        urls = [f"http://127.0.0.1:{held.enter_context(serving(app))}" for app in apps]
        found = embed(urls, lambda: setattr(dying, "is_dead", True))
    assert found == (0, 0, True)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
def test_a_process_that_is_killed_loses_no_row(seed, tmp_path):
    (tmp_path / "sentences.py").write_text(MODEL)
    random.seed(seed)
    options = "--name", "m", "--num-workers", "1", "--deadline", "20"
    with contextlib.ExitStack() as held:
        made = [
            held.enter_context(running(f"sentences:{kind}", *options, cwd=tmp_path))
            for kind in ("right", "wrong", "right")
        ]
        urls = [f"http://127.0.0.1:{port}" for _, port in made]
        asking = _client.Client("test")
        for url in urls:
            until(lambda url=url: _client.run(asking.is_ready(url)))
        process = made[2][0]
        later = threading.Timer(random.random() / 10, process.send_signal, [signal.SIGKILL])
        found = embed(urls, later.start)
        later.join()
    assert found == (0, 0, True)
