from tests.loaders.test_mutations import *


def test_some(sound):
    blocks(sound, 150, 150)
