import time

from qlora_exp.utils.notice import notice_if_slow


def test_only_a_slow_block_is_announced(capsys):
    with notice_if_slow("waiting", seconds=0.01):
        time.sleep(0.1)
    with notice_if_slow("nothing", seconds=5):
        pass
    assert capsys.readouterr().err == "waiting\n"
