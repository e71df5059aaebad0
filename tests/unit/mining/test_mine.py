"""`mine_hard_negatives` from rows to rows."""

from __future__ import annotations

import json
import shutil
import sys

import numpy as np
import pytest

from tests.pictures import write_pictures
from tests.tiny import PAIRS, tiny_bert, tiny_clip, tiny_cross_encoder, write_rows
from vembed.data import load_dataset_records
from vembed.errors import ConfigError, DataError
from vembed.inference import Predictor
from vembed.mining import Corpus, MiningRules, ModelChoice, mine_hard_negatives, vectors
from vembed.mining.rules import Excluded
from vembed.models.cross_encoder import CrossEncoder

ROWS = [
    *PAIRS,
    {"query": "red apple", "positive": "an apple a day"},  # a second positive of a query
    {"query": "old book", "positive": PAIRS[3]["positive"]},  # one positive of two queries
    {"query": PAIRS[5]["query"], "positive": PAIRS[5]["positive"]},  # a row twice
]
RULES = MiningRules(num_negatives=4, range_min=1, relative_margin=0.02)


@pytest.fixture
def rows(tmp_path):
    return write_rows(tmp_path / "rows.jsonl", ROWS)


@pytest.fixture(scope="module")
def predictor(tiny_st_path):
    return Predictor(str(tiny_st_path), device="cpu")


@pytest.fixture
def mine(tmp_path, rows, tiny_st_path):
    def run(data=rows, *, name="out.jsonl", **options):
        settings = {"model": ModelChoice(str(tiny_st_path), device="cpu"), "rules": RULES} | options
        result = mine_hard_negatives(data, output=tmp_path / name, **settings)
        return result, [json.loads(line) for line in (tmp_path / name).open(encoding="utf-8")]

    return run


def expected_negatives(predictor, rows, corpus, rules):
    """By sentence, with everything compared with everything."""
    queries = list(dict.fromkeys(row["query"] for row in rows))
    own = {query: {r["positive"] for r in rows if r["query"] == query} for query in queries}
    documents = list(dict.fromkeys(corpus))
    found = {}
    for query in queries:
        (vector,) = predictor.encode_query([query])
        cosines = predictor.encode_document(documents) @ vector
        positive = predictor.encode_document(sorted(own[query])) @ vector
        ranked = sorted(zip(-cosines, documents, strict=True))
        ranked = [(-c, text) for c, text in ranked if text not in own[query] | {query}]
        limit = positive.min() - rules.relative_margin * abs(positive.min())
        left = [text for cosine, text in ranked[rules.range_min :] if cosine <= limit]
        found[query] = left[: rules.num_negatives]
    return found


def test_every_row_gets_the_negatives_of_its_query(mine, predictor, tmp_path):
    result, written = mine(examples=3)
    expected = expected_negatives(predictor, ROWS, [row["positive"] for row in ROWS], RULES)
    assert [{k: row[k] for k in ("query", "positive")} for row in written] == ROWS
    assert [row.get("negatives", []) for row in written] == [expected[r["query"]] for r in ROWS]
    counts = [len(expected[row["query"]]) for row in ROWS]
    assert 0 < sum(counts) == result.negatives
    assert result.short_rows == sum(count < 4 for count in counts) > 0
    assert (result.rows, result.written, result.queries, result.candidates) == (27, 27, 24, 25)
    assert result.excluded.known == 26
    assert result.computed == 24 + 25
    assert -1 < result.negative_score < result.positive_score < 1
    assert [str(example.query) for example in result.examples] == [
        "red apple", PAIRS[11]["query"], PAIRS[23]["query"]
    ]  # fmt: skip
    first = result.examples[0]
    assert [str(found.item) for found in first.negatives] == expected["red apple"]
    assert len(first.positives) == 2
    cosine = (
        predictor.encode_query(["red apple"])
        @ predictor.encode_document([str(first.positives[0].item)]).T
    )
    assert first.positives[0].score == pytest.approx(cosine.item(), abs=1e-5)
    assert not (tmp_path / "out.jsonl.cache").exists()


def test_a_corpus_gives_the_candidates(mine, predictor, tmp_path):
    texts = [f"the {row['query']} is here" for row in PAIRS] + [PAIRS[0]["positive"]]
    corpus = write_rows(tmp_path / "corpus.jsonl", [{"body": text} for text in texts])
    result, written = mine(corpus=Corpus(str(corpus), "body"))
    expected = expected_negatives(predictor, ROWS, texts, RULES)
    assert [row.get("negatives", []) for row in written] == [expected[r["query"]] for r in ROWS]
    assert result.candidates == len(texts)


@pytest.mark.parametrize("ending", ["csv", "parquet"])
def test_other_files_give_the_same_rows(mine, tmp_path, ending):
    import pandas

    _, expected = mine()
    path = tmp_path / f"rows.{ending}"
    table = pandas.DataFrame(ROWS)
    table.to_csv(path, index=False) if ending == "csv" else table.to_parquet(path)
    assert mine(path, name="other.jsonl")[1] == expected


def test_prompts_decide(mine, tiny_st_path):
    other = ModelChoice(str(tiny_st_path), device="cpu", query_prompt="the old king of ")
    assert mine()[1] != mine(name="other.jsonl", model=other)[1]


def test_one_text_as_a_query_and_as_a_document_has_two_vectors(mine, predictor, tmp_path):
    rows = [*PAIRS, {"query": "a place", "positive": PAIRS[9]["query"]}]
    _, written = mine(write_rows(tmp_path / "both.jsonl", rows))
    expected = expected_negatives(predictor, rows, [row["positive"] for row in rows], RULES)
    assert [row.get("negatives", []) for row in written] == [expected[r["query"]] for r in rows]
    documents = predictor.encode_document([PAIRS[9]["query"]])
    assert not np.allclose(documents, predictor.encode_query([PAIRS[9]["query"]]), atol=1e-2)


def test_names_of_images_are_told(mine, tmp_path, caplog):
    write_pictures(tmp_path)
    names = sorted(path.name for path in tmp_path.glob("*.png"))
    rows = [{"query": f"picture {name}", "positive": name} for name in names]
    mine(write_rows(tmp_path / "names.jsonl", rows))
    assert "most of the documents are names of image files" in caplog.text


def test_scores_of_the_model(mine, predictor, rows, tmp_path):
    data = [dict(row, negatives=["a bird"]) if n == 1 else row for n, row in enumerate(ROWS)]
    _, written = mine(write_rows(tmp_path / "more.jsonl", data), scores=True)
    for row in written[:5]:
        documents = [row["positive"], *row.get("negatives", [])]
        cosines = predictor.encode_document(documents) @ predictor.encode_query([row["query"]])[0]
        assert row["teacher_scores"] == pytest.approx(cosines.tolist(), abs=2e-6)
    assert written[1]["negatives"][0] == "a bird"


@pytest.fixture(scope="module")
def cross_encoder_path(tmp_path_factory):
    return tiny_cross_encoder(tmp_path_factory.mktemp("judge") / "bert")


def test_a_cross_encoder_scores_what_is_near(mine, cross_encoder_path, tmp_path):
    rules = MiningRules(num_negatives=3, range_max=8)
    settings = {"rules": rules, "cross_encoder": str(cross_encoder_path), "scores": True}
    result, written = mine(cache=tmp_path / "cache", **settings)
    near = mine(name="near.jsonl", rules=MiningRules(num_negatives=8))[1]
    judge = CrossEncoder(str(cross_encoder_path))
    for row, pool in zip(written, near, strict=True):
        scores = judge.score([(row["query"], n) for n in pool["negatives"]], chunk_tokens=4096)
        best = np.argsort(-scores, kind="stable")[:3]
        assert row["negatives"] == [pool["negatives"][n] for n in best]
        own = judge.score([(row["query"], row["positive"])], chunk_tokens=4096)
        told = [*own.tolist(), *scores[best].tolist()]
        assert row["teacher_scores"] == pytest.approx(told, abs=1e-5)
    assert 0 < result.positive_score < 1
    again = mine(cache=tmp_path / "cache", overwrite=True, **settings)
    assert (again[0].computed, again[1]) == (0, written)
    assert result.computed == 24 + 25 + 24 * 8 + 26


def test_no_bi_encoder_is_taken_for_a_judge(mine, tiny_st_path):
    with pytest.raises(ConfigError, match="does not classify sequences"):
        mine(cross_encoder=str(tiny_st_path))


class TestShortRows:
    RULES = MiningRules(num_negatives=4, max_score=0.85)

    def test_are_kept_unless_told(self, mine):
        result, written = mine(rules=self.RULES)
        counts = [len(row.get("negatives", [])) for row in written]
        assert result.short_rows == sum(count < 4 for count in counts)
        assert 0 < result.short_rows < len(ROWS) == result.written

    def test_are_dropped(self, mine):
        kept = [row for row in mine(rules=self.RULES)[1] if len(row.get("negatives", [])) == 4]
        result, written = mine(rules=self.RULES, short_rows="drop", name="dropped.jsonl")
        assert written == kept
        assert result.written == len(kept) == result.rows - result.short_rows

    def test_are_an_error(self, mine, tmp_path):
        with pytest.raises(DataError, match=r"rows.jsonl: \d+ of 27 rows have fewer than 4 neg"):
            mine(rules=self.RULES, short_rows="error")
        assert not (tmp_path / "out.jsonl").exists()


class TestVectors:
    @pytest.fixture
    def files(self, tmp_path, predictor):
        queries = predictor.encode_query([row["query"] for row in ROWS])
        documents = predictor.encode_document([row["positive"] for row in ROWS])
        np.save(tmp_path / "q.npy", queries)
        np.save(tmp_path / "d.npy", documents)
        return {"query_vectors": tmp_path / "q.npy", "corpus_vectors": tmp_path / "d.npy"}

    def test_stand_in_for_the_model(self, mine, files):
        result, written = mine(name="given.jsonl", model=None, **files)
        assert written == mine()[1]
        assert result.computed == 0

    def test_one_side_alone(self, mine, files):
        result, written = mine(name="given.jsonl", query_vectors=files["query_vectors"])
        assert written == mine()[1]
        assert result.computed == 25

    def test_of_a_corpus(self, mine, files, predictor, tmp_path):
        texts = [row["positive"] for row in reversed(ROWS)]
        corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": text} for text in texts])
        np.save(tmp_path / "d.npy", predictor.encode_document(texts))
        _, written = mine(name="given.jsonl", model=None, corpus=str(corpus), **files)
        assert written == mine(corpus=str(corpus))[1]

    def test_what_does_not_fit_is_told(self, mine, files, tmp_path):
        corpus = write_rows(tmp_path / "corpus.jsonl", [{"text": row["positive"]} for row in PAIRS])
        lists = write_rows(tmp_path / "lists.jsonl", [{"query": "a", "positive": ["b", "c"]}])
        np.save(tmp_path / "short.npy", np.zeros((3, 32), np.float32))
        np.save(tmp_path / "small.npy", np.ones((27, 8), np.float32))
        np.save(tmp_path / "nan.npy", np.full((27, 32), np.nan, np.float32))
        np.save(tmp_path / "one.npy", np.ones((1, 32), np.float32))
        for options, message in (
            ({}, "model: has no use beside query_vectors and corpus_vectors"),
            ({"model": None, "corpus_vectors": None}, "model: is needed, unless"),
            ({"model": None, "corpus": str(corpus), "corpus_vectors": tmp_path / "d.npy"},
             "1 positives or negatives of the rows are not in the corpus, such as 'an apple a"),
            ({"model": None, "query_vectors": tmp_path / "short.npy"},
             r"query_vectors: .*short.npy: expected 27 rows.*float32 of shape \[3, 32\]"),
            ({"model": None, "query_vectors": tmp_path / "small.npy"}, "have 8 numbers, those of"),
            ({"model": None, "query_vectors": tmp_path / "nan.npy"}, "nan.npy: row 0: NaN"),
            ({"model": None, "query_vectors": tmp_path / "no.npy"}, "cannot be read as .npy"),
            ({"model": None, "data": lists, "query_vectors": tmp_path / "one.npy"},
             "row k is the positive of row k, and some rows have several"),
        ):  # fmt: skip
            with pytest.raises((ConfigError, DataError), match=message):
                mine(**(files | options))


class TestCache:
    def test_another_call_computes_what_is_missing(self, mine, tmp_path, monkeypatch):
        monkeypatch.setattr(vectors, "_CHUNK_ITEMS", 7)
        cache = tmp_path / "cache"
        first, expected = mine(cache=cache)
        again, written = mine(cache=cache, overwrite=True)
        assert (first.computed, again.computed) == (49, 0)
        assert again.cache == cache
        assert written == expected
        more = write_rows(tmp_path / "more.jsonl", [*ROWS, {"query": "a fox", "positive": "a den"}])
        assert mine(more, cache=cache, name="more.out.jsonl")[0].computed == 2

    def test_of_another_model_nothing_is_taken(self, mine, tmp_path, tiny_st_path):
        model = shutil.copytree(tiny_st_path, tmp_path / "model")
        choice = ModelChoice(str(model), device="cpu")
        cache = tmp_path / "cache"
        assert mine(cache=cache)[0].computed == 49
        # The same files elsewhere are the same model; another length, prompt or weight is not.
        assert mine(cache=cache, overwrite=True, model=choice)[0].computed == 0
        for other in ({"max_seq_length": 8}, {"query_prompt": ""}, {"document_prompt": "x "}):
            choice = ModelChoice(str(model), device="cpu", **other)
            assert mine(cache=cache, overwrite=True, model=choice)[0].computed == 49
        (model / "config_sentence_transformers.json").write_text('{"prompts": {}}')
        choice = ModelChoice(str(model), device="cpu")
        assert mine(cache=cache, overwrite=True, model=choice)[0].computed == 49

    def test_a_call_that_fails_goes_on_where_it_was(self, mine, tmp_path, monkeypatch):
        monkeypatch.setattr(vectors, "_CHUNK_ITEMS", 5)
        _, expected = mine(name="expected.jsonl")
        write, parts = vectors.VectorStore.write, []

        def write_some(self, keys, found):
            if len(parts) == 3:
                raise KeyboardInterrupt
            parts.append(len(keys))
            write(self, keys, found)

        with monkeypatch.context() as patch:
            patch.setattr(vectors.VectorStore, "write", write_some)
            with pytest.raises(KeyboardInterrupt):
                mine()
        assert not (tmp_path / "out.jsonl").exists()
        result, written = mine()
        assert result.computed == 49 - 15
        assert written == expected


class TestImages:
    @pytest.fixture
    def pictures(self, tmp_path):
        folder = write_pictures(tmp_path / "photos")
        names = sorted(path.name for path in folder.iterdir())
        rows = [{"caption": f"the {name[:-4]} one", "image": name} for name in names]
        return write_rows(folder / "rows.jsonl", rows)

    def test_images_are_found_for_texts(self, pictures, tmp_path):
        model = ModelChoice(str(tiny_clip(tmp_path / "clip")), device="cpu")
        output = pictures.parent / "out.jsonl"
        result = mine_hard_negatives(pictures, output=output, model=model, retrieval_mode="t2i")
        written = load_dataset_records(str(output), retrieval_mode="t2i")
        assert result.negatives == 3 * len(written) == sum(len(row.negatives) for row in written)
        predictor = Predictor(model.name, device="cpu")
        paths = sorted(pictures.parent.glob("*.png"))
        images = predictor.encode_image(paths)
        for number, row in enumerate(written):
            cosines = images @ predictor.encode_query([row.query.text])[0]
            cosines[number] = -2
            expected = [paths[n].name for n in np.argsort(-cosines)[:3]]
            assert [item.image.path for item in row.negatives] == expected

    def test_written_elsewhere_paths_would_lead_nowhere(self, mine, pictures, tmp_path):
        with pytest.raises(ConfigError, match="output: image paths are relative to .*photos"):
            mine(pictures, retrieval_mode="t2i")

    def test_a_model_of_texts_is_refused(self, pictures, tiny_st_path):
        with pytest.raises(ConfigError, match="embeds t, and retrieval_mode has i as document"):
            mine_hard_negatives(
                pictures, output=pictures.parent / "o.jsonl", model=str(tiny_st_path),
                retrieval_mode="t2i",
            )  # fmt: skip


def test_what_cannot_be_meant(mine, tmp_path, tiny_st_path):
    taught = write_rows(
        tmp_path / "taught.jsonl", [{"query": "a", "positive": "b", "teacher_scores": [1.0]}]
    )
    plain = tiny_bert(tmp_path / "bert")
    for options, message in (
        ({"data": taught}, "rows have teacher_scores, and mined negatives would have none"),
        ({"retrieval_mode": "t2i", "cross_encoder": "x"}, "cross_encoder: is for texts, and"),
        ({"short_rows": "pad"}, "short_rows: expected keep"),
        ({"rules": MiningRules(absolute_margin=3.0)}, "absolute_margin: expected a number"),
        ({"model": str(tmp_path / "no" / "model")}, "there is no folder"),
    ):
        with pytest.raises(ConfigError, match=message):
            mine(**options)
    assert mine(model=str(plain), name="plain.jsonl")[0].written == 27
    assert mine(rules=MiningRules(min_score=0.999), name="none.jsonl")[0].excluded != Excluded()


def test_without_faiss_what_to_install_is_told(mine, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ConfigError, match=r"pip install 'vembed\[mining\]'"):
        mine("no.jsonl")


def test_nothing_is_left_of_a_file_that_could_not_be_written(mine, rows, tmp_path, monkeypatch):
    from vembed.mining import mine as module

    monkeypatch.setattr(module, "_WINDOW_ROWS", 5)
    line, lines = module.RowWriter.line, []

    def fail(self, *arguments):
        lines.append(arguments)
        if len(lines) == 13:
            raise DataError("the disk")
        return line(self, *arguments)

    monkeypatch.setattr(module.RowWriter, "line", fail)
    with pytest.raises(DataError, match="the disk"):
        mine()
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "out.jsonl.cache"}
