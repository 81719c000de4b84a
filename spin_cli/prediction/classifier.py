"""A head as a scikit-learn classifier."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.base import BaseEstimator, ClassifierMixin

from spin_cli.backbone import Encoded
from spin_cli.choices import Dtype
from spin_cli.config import PredictConfig
from spin_cli.dataset import Row, text_fault
from spin_cli.errors import DataError
from spin_cli.prediction.predictor import Predictor, open_predictor
from spin_cli.prediction.stream import Prediction, classify_rows, fixed_windows

_LOADING = threading.Lock()
"""Held while one that was pickled is loaded: threads that share it are not each to load a model."""


class Classifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc] # scikit-learn is untyped
    """A trained head with its frozen model, as scikit-learn knows classifiers.

    The same code runs as in ``spin predict``, window by window, so the probabilities are the same,
    and so are the texts that are refused. `predict` gives every text a label: what ``spin predict``
    tells beside it, that a label is too uncertain or a text was cut, is in `predict_records`.

    A pickle holds the parameters alone: head and model are loaded again where it is first used.

    Parameters
    ----------
    head : str or Path
        Folder of ``spin train``.
    model : str, optional
        Where the model lies now, if elsewhere.
    adapter : str or Path, optional
        The same for its adapter.
    dtype, device : str
        As the options of the command line.
    device_map : str, optional
        ``auto``: spread the model over all GPUs, main memory and disk.
    batch_tokens : int, optional
        Tokens in a batch.
    threshold : float, optional
        Abstain from answers of a lower probability, from 0 to 1; default as trained.
    decision_thresholds : mapping, optional
        Probabilities from which classes are given, as ``{"spam": 0.9}``: that of one of two
        classes, or of any labels; default as trained.
    trust_remote_code, allow_pickle : bool
        Run code that the model brings; load pickled weights too. Never taken from the head.

    Attributes
    ----------
    classes_ : ndarray of str
        Label names; the columns of `predict_proba`.
    multilabel_ : bool
        Whether a text may have any number of them: then `predict` gives an indicator matrix and
        `predict_proba` independent probabilities, as scikit-learn's OneVsRestClassifier does.

    Examples
    --------
    >>> clf = Classifier.load("run/head")  # doctest: +SKIP
    >>> clf.predict(["not half bad"])  # doctest: +SKIP
    array(['good'], dtype='<U4')
    """

    def __init__(
        self,
        head: str | Path,
        *,
        model: str | None = None,
        adapter: str | Path | None = None,
        dtype: str = "auto",
        device: str = "auto",
        device_map: str | None = None,
        batch_tokens: int | None = None,
        threshold: float | None = None,
        decision_thresholds: Mapping[str, float] | None = None,
        trust_remote_code: bool = False,
        allow_pickle: bool = False,
    ) -> None:
        self.head = head
        self.model = model
        self.adapter = adapter
        self.dtype = dtype
        self.device = device
        self.device_map = device_map
        self.batch_tokens = batch_tokens
        self.threshold = threshold
        self.decision_thresholds = decision_thresholds
        self.trust_remote_code = trust_remote_code
        self.allow_pickle = allow_pickle

    @classmethod
    def load(cls, head: str | Path, **options: Any) -> Classifier:
        """A classifier that is ready for use.

        Raises
        ------
        ArtifactError
            The head is damaged, or was made for another model.
        ModelError
            The model cannot be loaded.
        UsageError
            A number among the options is out of its range.
        """
        return cls(head, **options).fit()

    def fit(self, X: Any = None, y: Any = None) -> Classifier:  # noqa: ARG002 - scikit-learn's names
        """Load head and model. Nothing is learned: a head is trained by ``spin train``."""
        config = PredictConfig(
            model=self.model,
            adapter=None if self.adapter is None else str(self.adapter),
            dtype=Dtype(self.dtype),
            device=self.device,
            device_map=self.device_map,
            batch_tokens=self.batch_tokens,
            threshold=self.threshold,
            decision_thresholds=self.decision_thresholds,
            trust_remote_code=self.trust_remote_code,
            allow_pickle=self.allow_pickle,
        )
        predictor = open_predictor(Path(self.head), config)
        self.classes_ = np.array(predictor.head.classes)
        self.multilabel_ = predictor.head.multi_label
        self.fitted_with_ = self.get_params()
        self.predictor_ = predictor  # last: by it other threads know that all is there
        return self

    def predict_proba(self, X: Sequence[str]) -> NDArray[np.float64]:
        """Class probabilities (n, n_classes), columns as in ``classes_``, of n texts.

        Raises
        ------
        DataError
            *X* is no list of texts; or an item is no text, or one that ``spin predict`` refuses:
            empty, with a NUL or half of a surrogate pair, of over two million characters, or
            without tokens. It is named by its position, from 0.
        ModelError
            The model gives NaN for a text.
        """
        predictor = self._loaded()
        found = []
        for rows, encoded in self._windows(X):
            places = [row.place for row in rows]
            values = predictor.rounded(predictor.gather(encoded), places)
            found.append(predictor.classify(values))
        return np.concatenate(found) if found else np.empty((0, len(self.classes_)))

    def predict_log_proba(self, X: Sequence[str]) -> NDArray[np.float64]:
        """Natural logarithms of `predict_proba`."""
        with np.errstate(divide="ignore"):
            return np.asarray(np.log(self.predict_proba(X)))

    def predict(self, X: Sequence[str]) -> NDArray[Any]:
        """Labels (n,) of n texts, by the head's own threshold where it has one.

        Of a multi-label head an indicator (n, n_classes) of int, 1 where a label is given. Texts
        that the head abstains from have a label too, for scikit-learn knows no answer that is left
        out: `predict_records` tells which they are.
        """
        probs = self.predict_proba(X)
        said = self._loaded().decide(probs)
        return said if said.ndim == 2 else np.asarray(self.classes_[said])

    def predict_records(self, X: Sequence[str]) -> list[Prediction]:
        """All that ``spin predict`` tells of each of n texts, in their order.

        Returns
        -------
        list of Prediction
            Each with `id` (the position, from 0, as text), `label` (of a multi-label head a list),
            `prob`, `probs` (by class), `truncated` (whether the text was cut) and `abstained`
            (whether the answer is too uncertain; None where neither head nor ``threshold`` sets a
            limit).

        Raises
        ------
        DataError, ModelError
            As `predict_proba`.
        """
        predictor, config = self._loaded(), PredictConfig()
        found: list[Prediction] = []
        for rows, encoded in self._windows(X):
            found += classify_rows(predictor, rows, encoded, config)
        return found

    def _windows(self, X: Sequence[str]) -> Iterator[tuple[list[Row], list[Encoded]]]:
        """Texts with their token ids, as many at a time as ``spin predict`` reads of a file."""
        texts, predictor = _checked(X), self._loaded()
        for window in fixed_windows(range(len(texts))):
            rows = [Row(str(at), texts[at], None, at, None, _place(at)) for at in window]
            encoded = predictor.encode([row.text for row in rows], [row.place for row in rows])
            yield rows, encoded

    def _loaded(self) -> Predictor:
        from sklearn.utils.validation import check_is_fitted

        check_is_fitted(self, "classes_")
        if self._behind():
            with _LOADING:
                if self._behind():
                    self.fit()
        return self.predictor_

    def _behind(self) -> bool:
        """Whether it was pickled, without the model, or has had other parameters set since."""
        return not hasattr(self, "predictor_") or self.fitted_with_ != self.get_params()

    def __getstate__(self) -> dict[str, Any]:
        """All but what cannot be pickled, and is loaded again: the model, as hooked as it is."""
        return {key: value for key, value in vars(self).items() if key != "predictor_"}

    def __sklearn_tags__(self) -> Any:
        """What scikit-learn may expect: texts in, nothing to be fitted."""
        tags = super().__sklearn_tags__()
        tags.input_tags.string, tags.input_tags.two_d_array = True, False
        tags.requires_fit = True
        return tags


def _checked(X: Any) -> list[str]:
    if isinstance(X, str):
        raise DataError("one text was given where several were expected", "Give [text].")
    try:
        iter(X)
    except TypeError as error:
        raise DataError(f"{type(X).__name__}, where a list of texts was expected") from error
    if getattr(X, "ndim", 1) != 1:  # of a table of pandas a list would be the columns' names
        raise DataError(f"{X.ndim} dimensions, where a list of texts was expected")
    texts = list(X)
    for at, text in enumerate(texts):
        if not isinstance(text, str):
            raise DataError(f"{_place(at)}: {type(text).__name__}, where a text was expected")
        if fault := text_fault(text):
            what, hint = fault
            raise DataError(f"{_place(at)}: {what}", hint)
    return [str(text) for text in texts]


def _place(at: int) -> str:
    return f"item {at}"
