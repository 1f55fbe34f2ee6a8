"""Every loss and temperature rule under its plain name: pure functions of tensors that see no model.

Student logits v and teacher logits u are (B, K), labels (B,); the losses of feature methods take (B, C) features or
lists of (B, C, H, W) maps. A loss is a scalar, the mean over the batch, in float32 whatever the autocast; it has no
weight of its own and leaves cross entropy to `ce_loss`:

    import mdistiller.losses as L

    loss = L.ce_loss(v, target) + 3 * L.dtkd_loss(v, u, temperature=4)
    loss = L.softened_kl(v, u, L.max_logit(v, u, 4.0))  # any rule under the KL divergence
    loss = L.softened_kl(v, u, L.centred(v, u, 1.0), divergence=L.reverse_kl)  # and under any other
"""

from mdistiller.distillers._divergences import (
    jensen_shannon,
    reverse_kl,
    skewed_kl,
    skewed_reverse_kl,
    total_variation,
)
from mdistiller.distillers.AT import at_loss
from mdistiller.distillers.CRD import nce_loss
from mdistiller.distillers.CTKD import curriculum, learned_temperature
from mdistiller.distillers.CWD import cwd_loss
from mdistiller.distillers.DIST import dist_loss, softened_dist
from mdistiller.distillers.DKD import dkd_loss, softened_dkd
from mdistiller.distillers.DTKD import dtkd_loss
from mdistiller.distillers.FitNet import hint_loss
from mdistiller.distillers.KD import kd_loss
from mdistiller.distillers.KDSVD import kdsvd_loss
from mdistiller.distillers.losses import (
    Temperatures,
    bounded,
    ce_loss,
    in_float32,
    kl_divergence,
    part_divergences,
    softened_kl,
    split,
    warmup,
)
from mdistiller.distillers.MLKD import correlation_losses, level_losses, mlkd_loss
from mdistiller.distillers.NORMKD import normkd_loss
from mdistiller.distillers.NST import nst_loss
from mdistiller.distillers.OFD import ofd_loss
from mdistiller.distillers.PKD import pkd_loss
from mdistiller.distillers.PKT import pkt_loss
from mdistiller.distillers.ReviewKD import hcl_loss
from mdistiller.distillers.RKD import rkd_loss
from mdistiller.distillers.RLD import mcd_loss, rld_loss, scd_loss
from mdistiller.distillers.rules import centred, erratum, fixed, max_logit, norm, sharpness, std
from mdistiller.distillers.SP import sp_loss
from mdistiller.distillers.token_rules import adakd, centred_sharpness
from mdistiller.distillers.TTM import transformed_teacher, ttm_loss, wttm_loss
from mdistiller.distillers.VID import vid_loss

__all__ = sorted(name for name in globals() if not name.startswith("_"))
