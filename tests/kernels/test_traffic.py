"""The bounds that the traffic model must stay within at the paper's sizes."""

from fastpmae_kernels import traffic


def test_the_loss_at_batch_768_moves_at_most_7_gigabytes():
    assert traffic.loss(batch=768).total <= 7e9
    assert traffic.usual_loss(batch=768) >= 13 * traffic.loss(batch=768).total


def test_nothing_of_the_logits_size_is_written_but_the_gradient():
    matrix = 768 * 147 * 4096 * 2
    assert traffic.sinkhorn(768 * 147, 4096).written < 0.03 * matrix
    assert traffic.cross_entropy(768 * 147, 4096).written < 1.001 * matrix
    assert traffic.cross_entropy(768 * 147, 4096, gradient=False).written < 0.001 * matrix


def test_each_pass_reads_the_logits_once():
    matrix = 768 * 147 * 4096 * 2
    assert traffic.column_logsumexp(768 * 147, 4096).read == matrix
    assert traffic.assigned_sums(768 * 147, 4096).read < 1.001 * matrix
    assert traffic.cross_entropy(768 * 147, 4096).read < 2.001 * matrix
