from __future__ import annotations

from lit_align.data.select import all_pairs, at_least, best, best_and_worst, ranked


def test_ranked_is_best_first_and_ties_keep_their_order():
    assert ranked([0.5, 2.0, -1.0, 2.0, 0.5]) == [1, 3, 0, 4, 2]
    assert ranked([]) == []


def test_best_is_the_first_of_equals():
    assert best([1.0, 3.0, 3.0]) == 1


def test_best_and_worst_are_the_ends_of_the_ranking():
    assert best_and_worst([1.0, 4.0, 1.0, 2.0]) == (1, 2)
    assert best_and_worst([2.0, 2.0]) is None
    assert best_and_worst([2.0]) is None
    assert best_and_worst([]) is None


def test_all_pairs_are_strict_and_ordered():
    assert all_pairs([1.0, 3.0, 2.0]) == [(1, 2), (1, 0), (2, 0)]
    assert all_pairs([1.0, 2.0, 1.0]) == [(1, 0), (1, 2)]
    assert all_pairs([1.0, 1.0]) == []


def test_at_least_is_inclusive_and_best_first():
    assert at_least([0.5, 2.0, -1.0, 3.0], 0.5) == [3, 1, 0]
    assert at_least([0.5, 0.4], 0.6) == []
