import pytest

from sgt_titan.config import tracking
from sgt_titan.config.schema import Config
from sgt_titan.config.tracking import require_tracking
from sgt_titan.errors import UserError


def test_a_run_that_is_to_be_tracked_needs_package_and_key(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config()
    require_tracking(config, {})
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"tensorboard is not installed; pip install 'sgt-titan\[train\]'"):
        require_tracking(config, {})
    config.metrics.tensorboard, config.metrics.wandb = False, True
    monkeypatch.setattr(tracking, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb is not installed"):
        require_tracking(config, {"WANDB_API_KEY": "k"})
    monkeypatch.setattr(tracking, "find_spec", lambda name: object())
    with pytest.raises(UserError, match=r"no key for api\.wandb\.ai; run `wandb login`"):
        require_tracking(config, {})
    require_tracking(config, {"WANDB_API_KEY": "k"})
    require_tracking(config, {"WANDB_MODE": "offline"})
    (tmp_path / ".netrc").write_text("machine wandb.mine.org login user password 0123\n")
    (tmp_path / ".netrc").chmod(0o600)
    require_tracking(config, {"WANDB_BASE_URL": "https://wandb.mine.org"})
    with pytest.raises(UserError, match="no key"):
        require_tracking(config, {})
