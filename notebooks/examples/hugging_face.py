"""A classifier of Hugging Face on three processes, one of which is killed.

In place of the small BERT with random weights, ``make`` may return any model that
``AutoModelForSequenceClassification.from_pretrained`` reads.
"""

import os
import signal

import torch
from transformers import BertConfig, BertForSequenceClassification

from coded_torch import CodedWrapper, workers


def make():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = BertConfig(vocab_size=1000, num_hidden_layers=2, num_labels=3, **sizes)
    return BertForSequenceClassification(config).eval()


if __name__ == "__main__":  # worker processes import this script
    model = make()
    tokens = torch.randint(1000, (60, 16))
    encoding = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    with workers.ProcessWorkers(3) as pool, torch.no_grad():
        coded = CodedWrapper(model, workers=pool)
        coded(**encoding)  # the processes start, and load the model
        os.kill(pool.pids[0], signal.SIGKILL)
        answers, report = coded.run(**encoding)
        same = torch.allclose(answers.logits, model(**encoding).logits, atol=1e-5)
        print(f"{report.ended}: {len(answers.logits)} rows, equal to the model's: {same}")
