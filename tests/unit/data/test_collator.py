import torch

from tests.tiny import wordpiece_tokenizer
from vembed.data import Collator, Record
from vembed.modes import Item

RECORDS = [
    Record(
        query=Item("red apple"),
        positives=(Item("the apple is red"), Item("sweet fruit")),
        negatives=(Item("blue"),),
        row_index=7,
        query_prompt="ask",
    ),
    Record(query=Item("cold"), positives=(Item("ice and snow in winter"),), row_index=3),
    Record(
        query=Item("red apple"),
        positives=(Item("sweet fruit"),),
        negatives=(Item("a"), Item("the big old house")),
        row_index=0,
        document_prompt="",
    ),
]


class WordProcessor:
    """One token for each word; remembers how it was called."""

    def __init__(self):
        self.calls = []

    def __call__(self, items, *, role, prompts=None):
        self.calls.append((role, None if prompts is None else list(prompts)))
        return dict(
            wordpiece_tokenizer()([i.text for i in items], padding=True, return_tensors="pt")
        )


class ImageProcessor:
    def __call__(self, items, *, role, prompts=None):
        return {"pixel_values": torch.zeros(len(items), 3, 224, 224)}


def test_roles_are_flat_and_in_the_order_of_the_queries():
    batch = Collator(WordProcessor())(RECORDS)
    assert batch["query_input_ids"].shape == batch["query_attention_mask"].shape == (3, 4)
    assert batch["query_token_type_ids"].shape == (3, 4)
    assert len(batch["positive_input_ids"]) == 4
    assert len(batch["negative_input_ids"]) == 3
    assert batch["counts_positive"].tolist() == [2, 1, 1]
    assert batch["counts_negative"].tolist() == [1, 0, 2]
    assert "counts_query" not in batch
    assert batch["lengths_query"] == [4, 3, 4]
    assert batch["lengths_positive"] == [6, 8, 9, 8]  # words unknown to it are cut up
    assert batch["lengths_negative"] == [3, 3, 6]
    assert batch["row_index"] == [7, 3, 0]
    for key in ("counts_positive", "counts_negative", "ids_query", "ids_positive", "ids_negative"):
        assert batch[key].dtype == torch.int64


def test_ids_are_equal_where_the_content_is():
    batch = Collator(WordProcessor())(RECORDS)
    query, positive = batch["ids_query"], batch["ids_positive"]
    assert query[0] == query[2] != query[1]
    assert positive[1] == positive[3] != positive[0]
    assert query[0] == Item("red apple").content_id
    assert len(batch["ids_negative"]) == 3


def test_prompts_go_with_each_item():
    processor = WordProcessor()
    Collator(processor)(RECORDS)
    assert processor.calls == [
        ("query", ["ask", None, None]),
        ("document", [None, None, None, ""]),
        ("document", [None, "", ""]),
    ]
    processor.calls.clear()
    Collator(processor)(RECORDS[1:2])
    assert processor.calls == [("query", None), ("document", None)]


def test_roles_that_no_row_has_are_absent():
    batch = Collator(WordProcessor())(RECORDS[1:2])
    assert not [key for key in batch if "negative" in key]
    labelled = [Record(query=Item("a"), label=2), Record(query=Item("the"), label=0)]
    batch = Collator(WordProcessor())(labelled)
    assert not [key for key in batch if "positive" in key]
    assert batch["labels"].tolist() == [2, 0]
    assert batch["labels"].dtype == torch.int64


def test_scores():
    rows = [
        Record(query=Item("a"), positives=(Item("b"),), score=0.25, teacher_scores=(1.0,)),
        Record(
            query=Item("c"),
            positives=(Item("d"),),
            negatives=(Item("e"), Item("f")),
            score=-1.0,
            teacher_scores=(3.0, 2.0, 1.5),
        ),
    ]
    batch = Collator(WordProcessor())(rows)
    assert batch["scores"].dtype == batch["teacher_scores"].dtype == torch.float32
    assert batch["scores"].tolist() == [0.25, -1.0]
    assert batch["teacher_scores"].tolist() == [[1.0, -torch.inf, -torch.inf], [3.0, 2.0, 1.5]]


def test_what_only_some_rows_have_is_absent():
    rows = [
        Record(query=Item("a"), positives=(Item("b"),), score=1.0, label=1, teacher_scores=(1.0,)),
        Record(query=Item("a"), positives=(Item("b"),)),
    ]
    assert not {"scores", "labels", "teacher_scores"} & set(Collator(WordProcessor())(rows))


def test_large_labels_and_ids_keep_all_bits():
    label = 2**63 - 1
    batch = Collator(WordProcessor())([Record(query=Item("a"), label=label)])
    assert int(batch["labels"][0]) == label


def test_images_cost_their_pixels():
    batch = Collator(ImageProcessor())(RECORDS[:1])
    assert batch["lengths_positive"] == [196, 196]
    assert batch["positive_pixel_values"].shape == (2, 3, 224, 224)


def test_an_image_beside_a_text_costs_both():
    def both(items, *, role, prompts=None):
        return WordProcessor()(items, role=role) | ImageProcessor()(items, role=role)

    batch = Collator(both)(RECORDS)
    assert batch["lengths_query"] == [196 + length for length in (4, 3, 4)]


def test_keys_are_equal_where_the_model_input_is():
    same = Item("red apple")
    records = [
        Record(query=same, positives=(same, Item("b")), negatives=(Item("c"), Item("b"))),
        Record(query=same, positives=(Item("b"),), document_prompt="passage: "),
        Record(query=Item("other"), positives=(Item("c"),), query_prompt=""),
    ]
    batch = Collator(WordProcessor())(records)
    assert batch["keys_query"] == [0, 0, 1]
    # Never those of a query; not those of the same text under another prompt.
    assert batch["keys_positive"] == [2, 3, 4, 5]
    assert batch["keys_negative"] == [5, 3]
