"""Reading a long file of records is told, as other ranks and people wait for it."""

from pathlib import Path

import numpy as np
import pytest

from megatron_7b.data.records.corpus import EncodedRecord
from megatron_7b.finetune import corpora


@pytest.mark.parametrize("seconds", [0.0, 60.0])
def test_a_long_file_is_told_record_by_record(seconds: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpora, "_SECONDS_BETWEEN_REPORTS", seconds)
    file = tmp_path / "chats.jsonl"
    file.write_text("{}\n" * 4, encoding="utf-8")
    records = [EncodedRecord([np.arange(number)]) for number in range(4)]
    said: list[tuple[str, str]] = []
    assert list(corpora._told(records, file, "conversations", lambda *words: said.append(words))) == records
    if seconds:
        assert not said
    else:
        assert [text.rpartition(",")[0] for _, text in said] == [
            f"{file}: {n} of 4 conversations" for n in (1, 2, 3, 4)
        ]
        assert said[-1] == ("encoding", f"{file}: 4 of 4 conversations, 0.0 s left")
