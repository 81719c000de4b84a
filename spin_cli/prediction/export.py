"""Heads for other programs: one file that turns token ids into probabilities, without spin."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spin_cli import artifacts, atomic
from spin_cli.backbone.batching import refuse_parts
from spin_cli.choices import ExportFormat
from spin_cli.config import PredictConfig
from spin_cli.errors import ModelError
from spin_cli.head import CARD, LABELS, Head
from spin_cli.prediction.predictor import Predictor, open_predictor
from spin_cli.prediction.program import Program

PROGRAM, ONNX = "model.pt2", "model.onnx"
AS_OUT = "as OUT"
"""How the command is told the folder to write."""
TOLERANCE = 1e-4
"""Difference in a probability that is accepted."""
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
INSTALL_ONNX = "pip install 'spin-cli[onnx]'"
SAMPLES = (
    "A good film.",
    "I have waited ten days for my parcel, and nobody answers the telephone.",
    "no",
    "It was neither the best of meals nor the worst, but the waiter, who had to look after twelve"
    " tables at once, never stopped smiling, and that is why we shall come again.",
)


def export(
    folder: Path,
    output: Path,
    config: PredictConfig,
    *,
    formats: Sequence[ExportFormat] | None = None,
    texts: Sequence[str] = SAMPLES,
    force: bool = False,
) -> dict[str, Any]:
    """Write a head with its part of the model as a folder that needs no spin.

    Parameters
    ----------
    folder : Path
        Of ``spin train``.
    output : Path
        ``model.pt2`` and, with its packages, ``model.onnx``; tokenizer; ``labels.json``.
    config : PredictConfig
    formats : the files wanted; None: the program, and ONNX where its packages are installed
    texts : what the files are compared with ``predict`` on
    force : bool
        Replace what is there.

    Returns
    -------
    dict
        For each file its bytes and the largest difference in a probability.

    Raises
    ------
    ArtifactError
        The head is not valid, or *output* is in the way.
    ModelError
        The model cannot be exported, the file does not agree with ``predict`` to 1e-4, or ONNX is
        asked for and not installed.
    """
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if formats is None:
        formats = [ExportFormat.PT2] if missing else list(ExportFormat)
    if ExportFormat.ONNX in formats and missing:
        raise ModelError(f"--format onnx needs {', '.join(missing)}", INSTALL_ONNX)
    atomic.check_vacant(output, force=force, how=AS_OUT)
    parent = artifacts.read_manifest(folder, "head")
    predictor = open_predictor(folder, config)
    program = trace_program(predictor)
    found: dict[str, Any] = {}
    with atomic.building(output, force=force, how=AS_OUT) as place:
        if ExportFormat.PT2 in formats:
            torch.export.save(program, place / PROGRAM)
            run: Any = torch.export.load(place / PROGRAM).module()
            found[PROGRAM] = _compare(predictor, texts, lambda ids, mask: run(ids, mask).numpy())
        if ExportFormat.ONNX in formats:
            _save_onnx(program, place / ONNX)
            found[ONNX] = _compare(predictor, texts, _onnx_runner(place / ONNX))
        _save_rest(predictor, place)
        content = {
            "parent": artifacts.parent_entry(output, folder, parent),
            "head": predictor.head.model,
            "neurons": predictor.head.neurons,
            "checks": found,
        }
        artifacts.write_manifest(place, "export", content)
    return {
        name: {
            "bytes": sum(path.stat().st_size for path in output.glob(f"{name}*")),
            "difference": difference,
        }
        for name, difference in found.items()
    }


def trace_program(predictor: Predictor) -> Any:
    """One `torch.export` program with batch and length free.

    Raises
    ------
    ModelError
        The model cannot be traced; the reason is torch's.
    """
    ids, mask = pad(predictor, [[token] * length for token, length in ((3, 7), (4, 5))])
    batch = torch.export.Dim("batch", min=1, max=2**16)
    length = torch.export.Dim("length", min=1, max=predictor.model.max_length)
    shape = {0: batch, 1: length}
    try:
        with _quiet(), torch.no_grad():
            return torch.export.export(
                Program(predictor).eval(),
                (ids, mask),
                dynamic_shapes={"input_ids": shape, "attention_mask": shape},
                strict=False,
            )
    except Exception as error:  # whatever torch cannot trace
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(
            f"{predictor.model.options.model}: torch.export cannot trace it ({reason[0]})"
        ) from error


def pad(predictor: Predictor, batch: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask (B, T), padded on the right."""
    width = max(map(len, batch))
    fill = predictor.model.pad_id
    ids = [[*row, *[fill] * (width - len(row))] for row in batch]
    mask = [[1] * len(row) + [0] * (width - len(row)) for row in batch]
    device = predictor.model.device
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def _save_onnx(program: Any, path: Path) -> None:
    try:
        with _quiet():
            torch.onnx.export(program, f=str(path), dynamo=True, verbose=False)
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{path.name}: torch.onnx cannot write it ({reason[0]})") from error


def _onnx_runner(path: Path) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(ids: torch.Tensor, mask: torch.Tensor) -> NDArray[Any]:
        values = dict(zip(names, (ids.cpu().numpy(), mask.cpu().numpy()), strict=True))
        return np.asarray(session.run(None, values)[0])

    return run


def _compare(predictor: Predictor, texts: Sequence[str], run: Any) -> float:
    """Largest difference in a probability between *run* and ``predict``.

    Each text runs by itself and all of them together. A neuron on the border between two numbers
    of the storage format may fall to either side; what that can change is allowed for.
    """
    encoded = predictor.encode(texts)
    refuse_parts(encoded)
    worst = 0.0
    for group in ([one] for one in encoded), [encoded]:
        for batch in group:
            values = predictor.gather(batch)
            expected = predictor.classify(predictor.rounded(values))
            found = run(*pad(predictor, [each.ids for each in batch]))
            apart = np.abs(found - expected).max(1)
            if not (apart <= TOLERANCE + rounding_slack(predictor, values)).all():
                raise ModelError(
                    f"the exported program differs from predict by {apart.max():.1e}",
                    "This is an error of spin: please report the model's architecture.",
                )
            worst = max(worst, float(apart.max()))
    return worst


def rounding_slack(predictor: Predictor, values: NDArray[np.float32]) -> NDArray[np.float64]:
    """What neurons on the border between two stored numbers can change in a logit (n,)."""
    head = predictor.head
    near = np.float32(1e-5)
    spread = np.abs(
        predictor.rounded(values * (1 + near)) - predictor.rounded(values * (1 - near))
    ).astype(np.float64)
    if head.hidden is not None:
        spread = spread @ np.abs(head.hidden[0]).T
    return np.asarray((spread @ np.abs(head.weight).T).max(1))


def _save_rest(predictor: Predictor, place: Path) -> None:
    tokenizer, options, head = predictor.model.tokenizer, predictor.model.options, predictor.head
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(predictor.model.pad_id)
    tokenizer.padding_side, tokenizer.truncation_side = "right", options.truncation_side.value
    tokenizer.save_pretrained(place)
    labels: dict[str, Any] = {
        "classes": head.classes,
        "threshold": head.threshold,
        "abstain_below": head.abstain_below,
        "max_length": predictor.model.max_length,
        "long": options.long.value,
        "prompt_template": options.prompt_template,
        "special_tokens": options.special_tokens,
    }
    if head.thresholds is not None:
        labels["multi_label"] = True
        labels["thresholds"] = dict(zip(head.classes, head.thresholds.tolist(), strict=True))
    atomic.write_json(place / LABELS, labels)
    atomic.write_text(place / CARD, _card(predictor))


def _card(predictor: Predictor) -> str:
    classes = json.dumps(list(predictor.head.classes), ensure_ascii=False)
    return f"""# Exported text classifier

Classes, in the order of the probabilities: {classes}

```python
import torch
from transformers import AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")
program = torch.export.load("{PROGRAM}").module()
texts = ["not half bad"]  # put into the prompt_template of {LABELS}, if there is one
batch = tokenizer(
    texts, padding=True, truncation=True, max_length={predictor.model.max_length},
    return_tensors="pt", add_special_tokens={predictor.model.options.special_tokens},
)
print(program(batch["input_ids"], batch["attention_mask"]))
```

Longer texts are cut here, template and all, where spin keeps the template whole or, as `long` in
{LABELS} may say, reads them in windows.
{_decision(predictor.head)}
`{ONNX}`, where it is there, takes the same two inputs.
"""


def _decision(head: Head) -> str:
    """How probabilities become an answer."""
    decision = (
        f"With two classes and a `threshold` in {LABELS}, the second is predicted from that"
        " probability on."
    )
    if head.multi_label:
        decision = (
            "A text may have any number of these: each is given from its own probability on, of"
            f" `thresholds` in {LABELS}."
        )
    limit = head.abstain_below
    if limit is not None:
        what = "of the predicted class"
        if head.multi_label:
            what = "that exactly these labels apply, taken as independent,"
        decision += (
            f"\nWhere the probability {what} is below `abstain_below` in {LABELS} ({limit:g}), spin"
            " marks the answer as too uncertain; the program gives probabilities all the same."
        )
    return decision


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep what torch's exporters tell about themselves from the user."""
    kept = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(kept)
