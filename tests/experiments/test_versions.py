"""Results do not change unnoticed: a finished training is found again by the versions of what made it (see `identity`).

A row of RECORDED is named after what is measured and the sum of the versions of all that takes part, so that it is out
of date as soon as one of them is raised; a row of DEFAULTS after a component and its version. A failing test prints the
row that should stand there.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from pydantic import BaseModel
from torch import Tensor

from glocal import engine, inference
from glocal.data import prepare as preparing
from glocal.data.image import Geometry, Volume
from glocal.data.plan import Plan, PreprocessOptions
from glocal.data.prepare import prepare, prepare_labels, restore
from glocal.data.split import Split
from glocal.data.store import Store
from glocal.engine import TrainingOptions
from glocal.evaluation import metrics
from glocal.evaluation.metrics import METRICS, case_metrics
from glocal.finetuning.finetune import finetune
from glocal.finetuning.registry import STRATEGIES
from glocal.inference import folded, slice_probabilities
from glocal.networks.registry import NETWORKS, build, network_options
from glocal.pretraining.pretrain import pretrain
from glocal.pretraining.registry import METHODS
from glocal.randomness import generator
from glocal.runs import settings_of
from glocal.views import view
from glocal.views.intensity import IntensityOptions
from glocal.views.spatial import SpatialOptions
from glocal.views.view import ViewOptions, draw_view

RECORDED: dict[str, list[float]] = yaml.safe_load("""
pcl 8: [3.6563, 3.8064]
pcl, partitions 8: [3.2274, 2.7198]
gcl 9: [2.9305, 2.5759, 1.0998, 0.67347]
gcl, G^R and L^D 9: [3.4431, 2.5204, 1.8524, 1.202]
gcl, G^D- 9: [3.0598, 2.9667]
simclr 8: [2.4844, 2.3876]
moco 8: [0.82391, 2.6694]
byol 8: [4.4784, 4.1744]
simsiam 8: [0.026498, -0.020577]
simtriplet 8: [0.037229, 0.072546]
swav 9: [5.6764, 3.4464]
dino 9: [2.8879, 1.2673]
ideal 8: [5.7714, 5.7301]
pgl 8: [1.6204, 1.5629]
jcl 9: [19.458, 6.3701]
pixel-global 9: [17.091, 16.168]
rotation 8: [1.4172, 1.3997]
inpainting 8: [0.22796, 0.11464]
context-restoration 8: [0.22405, 0.1195]
label-efficient 8: [2.3782, 2.4456, 6.3898, 6.3174]
cps 7: [6.6349, 6.6297]
cross-consistency 7: [7.0564, 6.7122]
mc-net 7: [4.6089, 4.482]
adversarial 7: [2.8719, 2.7997]
mean-teacher 8: [2.2048, 3.4804]
uncertainty-mean-teacher 9: [3.3808, 3.4708]
ict 8: [2.9675, 2.7516]
fixmatch 7: [2.843, 2.6475]
unimatch 7: [1.2958, 1.297]
bcp 8: [4.4621, 7.4144]
mixup 7: [2.1978, 2.1963]
self-training 8: [2.2358, 3.855]
supervised 7: [2.183, 2.0316]
supervised, Dice 7: [0.7481, 0.73567]
task-augmentation 7: [6.2257, 2.1794]
slices 1: [0.47789, 0.30595, 0.2481, 0.25129, 0.24504, 0.48849, 0.12252, 0.13412, 0.24799, 0.49215, 0.12399, 0.13603]
slices, resampled 1: [-0.01611, 0.97569, 0.01738, 0.027606, 0.27728, 0.50696, 0.13864, 0.15769, 0.23846, 0.47957,
  0.11923, 0.1293]
slices, window 1: [0.33471, 0.3827, 0.17012, 0.17512, 0.23909, 0.48534, 0.11962, 0.1327, 0.24762, 0.49047, 0.12389,
  0.13439]
view 2: [0.5085, 0.30634, 0.25276, 0.25096, 0.40476, 0.58963, 0.20909, 0.19752]
prediction, unet 3: [0.36308, 0.1501, 0.18202, 0.1823, 0.31603, 0.16159, 0.15787, 0.15689, 0.85861, 0.84294, 0.42575,
  0.42262]
prediction, pcl-unet 3: [0.4288, 0.11631, 0.21264, 0.21217, 0.20395, 0.10744, 0.10419, 0.099416, 0.78095, 0.9694,
  0.40159, 0.4402]
prediction, attention-unet 3: [0.33455, 0.20453, 0.17274, 0.16941, 0.3123, 0.23954, 0.14741, 0.15099, 0.94908,
  0.80184, 0.47108, 0.48066]
prediction, uctransnet 3: [0.17489, 0.072136, 0.08899, 0.085713, 0.44826, 0.031578, 0.22366, 0.22276, 1.141, 0.34808,
  0.56798, 0.58287]
prediction, bcdu-net 3: [0.3798, 0.035066, 0.19056, 0.18912, 0.30825, 0.025499, 0.15434, 0.15265, 0.12692, 0.48442,
  0.056909, 0.095824]
prediction, resnet50-unet 3: [0.27752, 0.16287, 0.14047, 0.13573, 0.47004, 0.22218, 0.23693, 0.24092, 0.95604,
  0.53993, 0.47023, 0.47943]
prediction, nnunet-plain 3: [0.3209, 0.19308, 0.16832, 0.15601, 0.19431, 0.12969, 0.092372, 0.097089, 1.167, 0.96729,
  0.54781, 0.60029]
prediction, nnunet-residual 3: [0.35072, 0.1282, 0.17788, 0.17272, 0.41231, 0.14063, 0.20516, 0.20886, 0.68883,
  0.50102, 0.33773, 0.35035]
metrics 1: [0.68171, 0.51712, 5.6, 6.0, 1.1152, 0.80387, 0.61062, 0.43949, 5.1306, 5.7723, 1.4455, 0.74742, 1.0, 1.0,
  0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 69.663, 69.663, 69.663, 0.0]
""")

# Of pre-training methods and strategies those that are not the engine's.
DEFAULTS: dict[str, dict[str, Any]] = yaml.safe_load("""
engine 1: {seed: 0, precision: auto, threads: 0, deterministic: false, compile: false, max_iterations: 1000,
  optimizer: adamw, learning_rate: 0.001, weight_decay: 0.01, warmup_iterations: 30, schedule: cosine}
pcl 1: {max_iterations: 10000, optimizer: sgd, learning_rate: 0.01, weight_decay: 1.0e-05, method: pcl, network: {},
  batch: 32, threshold: 0.11, position: pcl, labels: position, temperature: 0.1, scale: supcon, head: pooled, hidden:
  512, outputs: 512, augmentation: {spatial: {rotation: 180.0, scale: [0.7, 1.3], flip: [0.5, 0.5], elastic: 4.0,
  probability: 0.67}}}
gcl 2: {max_iterations: 10000, optimizer: adam, weight_decay: 0.0, warmup_iterations: 0, schedule: constant, method:
  gcl, network: {}, temperature: 0.1, strategy: D, batch: 20, volumes: 5, partitions: 4, originals: true, views:
  auto, hidden: 1024, outputs: 128, augmentation: {spatial: {crop: [0.52, 0.52]}, intensity: {brightness: 0.3,
  contrast: 0.3, clip: [0.0, 1.5]}}, local: random, local_batch: 10, blocks: 3, regions: 13, kernel: 3, projection:
  true, negatives: neighbours, frozen_batch_norm: eval}
byol 1: {max_iterations: 10000, optimizer: lars, learning_rate: 0.2, weight_decay: 1.5e-06, gradient_clip: 0.0, method:
  byol, network: {}, batch: 32, momentum: 0.996, hidden: 4096, outputs: 256, augmentation: {spatial: {anisotropy: 0.33,
  crop: [0.45, 1.0], flip: [0.0, 0.5]}, intensity: {brightness: 0.4, contrast: 0.4, blur: 1.5, probability: 0.8}}}
context-restoration 1: {max_iterations: 10000, optimizer: adam, weight_decay: 0.0, warmup_iterations: 0, schedule:
  constant, gradient_clip: 0.0, method: context-restoration, network: {}, batch: 40, pairs: 10, patch: 5, tries: 100,
  augmentation: {}}
dino 2: {max_iterations: 10000, learning_rate: 0.0005, weight_decay: 0.04, warmup_iterations: 300, gradient_clip: 3.0,
  method: dino, network: {}, batch: 32, momentum: 0.996, temperature: 0.1, teacher_temperature: 0.07,
  teacher_temperature_start: 0.04, teacher_warmup: 1000, centring: 0.9, frozen: 100, hidden: 2048, head_norm: false,
  bottleneck: 256, outputs: 1024, augmentation: {spatial: {anisotropy: 0.33, crop: [0.37, 1.0], flip: [0.0, 0.5]},
  intensity: {brightness: 0.4, contrast: 0.4, blur: 1.5, probability: 0.8}}, local_views: 0, local_size: 0.43,
  local_augmentation: {spatial: {anisotropy: 0.33, crop: [0.22, 0.63], flip: [0.0, 0.5]}, intensity: {brightness: 0.4,
  contrast: 0.4, blur: 1.5, probability: 0.8}}}
ideal 1: {max_iterations: 10000, optimizer: adam, learning_rate: 1.0e-05, weight_decay: 0.0, warmup_iterations: 0,
  schedule: constant, gradient_clip: 0.0, method: ideal, network: {}, batch: 32, momentum: 0.999, temperature: 0.2,
  outputs: 128, correspondence: similarity, own_cells: true, symmetric: false, augmentation: {spatial: {anisotropy:
  0.33, crop: [0.45, 1.0], flip: [0.0, 0.5]}, intensity: {brightness: 0.4, contrast: 0.4, blur: 1.5, probability: 0.8}}}
inpainting 1: {max_iterations: 10000, optimizer: adam, weight_decay: 0.0, warmup_iterations: 0, schedule: constant,
  gradient_clip: 0.0, method: inpainting, network: {}, batch: 40, side: [0.52, 0.52], place: random, over: image,
  augmentation: {}}
jcl 2: {max_iterations: 10000, optimizer: sgd, learning_rate: 0.01, weight_decay: 1.0e-05, gradient_clip: 0.0, method:
  jcl, network: {}, batch: 16, blocks: 2, connection: shared, momentum: 0.999, stages: 1, downsampled:
  true, lambda1: 1.0, lambda2: 0.5, lambda3: 1.0, dense: supcon, dominant_pixel_projector: false, outputs: 128,
  threshold: 0.11, position: pcl, temperature: 0.1, scale: supcon, view_groups: 2, fixed: {}, variable: {spatial:
  {rotation: 180.0, scale: [0.7, 1.3], flip: [0.5, 0.5], elastic: 4.0, probability: 0.67}}}
label-efficient 1: {max_iterations: 10000, optimizer: adam, learning_rate: 0.0003, weight_decay: 0.0001, gradient_clip:
  0.0, labels: 2, validation: 0, draw: 0, method: label-efficient, network: {}, outputs: 128, batch: 120,
  slice_temperature: 0.5, augmentation: {spatial: {rotation: 180.0, scale: [0.7, 1.25], elastic: 4.0, probability: 0.5},
  intensity: {brightness: 0.3, gamma: [0.5, 2.0], noise: 0.1, probability: 0.5}}, local_batch: 4, temperature: 0.1,
  pixels: stride, stride: 4, block: 32, hidden: 256, local_augmentation: {intensity: {brightness: 0.3, gamma: [0.5,
  2.0], noise: 0.1, probability: 0.5}}}
moco 1: {max_iterations: 10000, optimizer: sgd, learning_rate: 0.00375, weight_decay: 0.0001, warmup_iterations: 0,
  gradient_clip: 0.0, method: moco, network: {}, batch: 32, queue: 4096, momentum: 0.999, temperature: 0.2, outputs:
  128, repeats: ignore, key_statistics: running, augmentation: {spatial: {anisotropy: 0.33, crop: [0.45, 1.0], flip:
  [0.0, 0.5]}, intensity: {brightness: 0.4, contrast: 0.4, blur: 1.5, probability: 0.8}}}
pgl 1: {max_iterations: 10000, optimizer: lars, learning_rate: 0.2, weight_decay: 1.5e-06, gradient_clip: 0.0, method:
  pgl, network: {}, batch: 32, momentum: 0.996, outputs: 128, augmentation: {spatial: {rotation: 30.0, crop: [0.55,
  1.0], flip: [0.5, 0.5]}, intensity: {contrast: 0.3, gamma: [0.7, 1.5]}}}
pixel-global 2: {max_iterations: 10000, optimizer: lars, learning_rate: 0.2, weight_decay: 1.0e-06,
  warmup_iterations: 40,
  gradient_clip: 0.0, method: pixel-global, network: {}, batch: 8, variant: full, symmetric: false, momentum: 0.996,
  outputs: 256, pixel_outputs: 32, match: nearest, stabiliser_grad: false, passes: 20, passes_at_once: 5, uncertainty:
  mean, dropout: 0.1, student_dropout: true, paper_exact: false, temperature: 0.1, teacher_temperature: 0.04, centring:
  0.9, augmentation: {spatial: {rotation: 30.0, crop: [0.55, 1.0], flip: [0.5, 0.5]}, intensity: {contrast: 0.3, gamma:
  [0.7, 1.5]}}}
rotation 1: {max_iterations: 10000, optimizer: adam, weight_decay: 0.0, warmup_iterations: 0, schedule: constant,
  gradient_clip: 0.0, method: rotation, network: {}, batch: 10, augmentation: {}}
simclr 1: {max_iterations: 10000, optimizer: lars, learning_rate: 0.4242640687119285, weight_decay: 1.0e-06,
  gradient_clip: 0.0, method: simclr, network: {}, batch: 32, temperature: 0.1, outputs: 128, head_norm: false,
  augmentation: {spatial: {anisotropy: 0.33, crop: [0.45, 1.0], flip: [0.0, 0.5]}, intensity: {brightness: 0.4,
  contrast: 0.4, blur: 1.5, probability: 0.8}}}
simsiam 1: {max_iterations: 10000, optimizer: sgd, learning_rate: 0.00625, weight_decay: 0.0001, warmup_iterations: 0,
  gradient_clip: 0.0, method: simsiam, network: {}, batch: 32, outputs: 2048, hidden: 512, augmentation: {spatial:
  {anisotropy: 0.33, crop: [0.45, 1.0], flip: [0.0, 0.5]}, intensity: {brightness: 0.4, contrast: 0.4, blur: 1.5,
  probability: 0.8}}}
simtriplet 1: {max_iterations: 10000, optimizer: sgd, learning_rate: 0.00625, weight_decay: 0.0001, warmup_iterations:
  0, gradient_clip: 0.0, method: simtriplet, network: {}, batch: 32, outputs: 2048, hidden: 512, augmentation: {spatial:
  {anisotropy: 0.33, crop: [0.45, 1.0], flip: [0.0, 0.5]}, intensity: {brightness: 0.4, contrast: 0.4, blur: 1.5,
  probability: 0.8}}}
swav 2: {max_iterations: 10000, optimizer: lars, learning_rate: 0.6, weight_decay: 1.0e-06, warmup_iterations: 300,
  gradient_clip: 0.0, method: swav, network: {}, batch: 32, prototypes: 3000, temperature: 0.1, epsilon: 0.05,
  sinkhorn_iterations: 3, frozen: 313, queue: 0, queue_from: 1000, hidden: 2048, outputs: 128, augmentation: {spatial:
  {anisotropy: 0.33, crop: [0.37, 1.0], flip: [0.0, 0.5]}, intensity: {brightness: 0.4, contrast: 0.4, blur: 1.5,
  probability: 0.8}}, local_views: 0, local_size: 0.43, local_augmentation: {spatial: {anisotropy: 0.33, crop: [0.22,
  0.37], flip: [0.0, 0.5]}, intensity: {brightness: 0.4, contrast: 0.4, blur: 1.5, probability: 0.8}}}
cps 1: {gradient_clip: 0.0, strategy: cps, network: {}, labels: 2, validation: 0, draw: 0, batch: 10, loss: dice+ce,
  evaluate_every: 50, augmentation: {spatial: {rotation: 30.0, scale: [0.8, 1.3], anisotropy: 0.1, shift: 0.15, elastic:
  2.5}, intensity: {brightness: 0.2, contrast: 0.3, gamma: [0.7, 1.5], noise: 0.05}}, unlabelled_batch: 10, weight: 0.1,
  ramp_up: 0.4}
cross-consistency 1: {gradient_clip: 0.0, strategy: cross-consistency, network: {}, labels: 2, validation: 0, draw: 0,
  batch: 10, loss: dice+ce, evaluate_every: 50, augmentation: {spatial: {rotation: 30.0, scale: [0.8, 1.3], anisotropy:
  0.1, shift: 0.15, elastic: 2.5}, intensity: {brightness: 0.2, contrast: 0.3, gamma: [0.7, 1.5], noise: 0.05}},
  unlabelled_batch: 10, weight: 1.0, ramp_up: 0.0, decoders: [bilinear, transposed], predict: mean,
  threshold: 0.0}
mc-net 1: {gradient_clip: 0.0, strategy: mc-net, network: {}, labels: 2, validation: 0, draw: 0, batch: 10, loss:
  dice+ce, evaluate_every: 50, augmentation: {spatial: {rotation: 30.0, scale: [0.8, 1.3], anisotropy: 0.1, shift: 0.15,
  elastic: 2.5}, intensity: {brightness: 0.2, contrast: 0.3, gamma: [0.7, 1.5], noise: 0.05}}, unlabelled_batch: 10,
  weight: 0.1, ramp_up: 0.4, decoders: [bilinear, transposed], predict: mean, temperature: 0.1,
  sharp_grad: true}
adversarial 1: {gradient_clip: 0.0, strategy: adversarial, network: {}, labels: 2, validation: 0, draw: 0,
  batch: 10, loss: dice+ce, evaluate_every: 50, augmentation: {spatial: {rotation: 30.0, scale: [0.8, 1.3], anisotropy:
  0.1, shift: 0.15, elastic: 2.5}, intensity: {brightness: 0.2, contrast: 0.3, gamma: [0.7, 1.5], noise: 0.05}},
  unlabelled_batch: 10, weight: 0.1, ramp_up: 0.4, discriminator_rate: 0.0001, width: 64, dropout: 0.5}
mean-teacher 2: {gradient_clip: 0.0, strategy: mean-teacher, network: {}, labels: 2, validation: 0, draw: 0, batch:
  10, loss: dice+ce, evaluate_every: 50, augmentation: {spatial: {rotation: 30.0, scale: [0.8, 1.3], anisotropy: 0.1,
  shift: 0.15, elastic: 2.5}, intensity: {brightness: 0.2, contrast: 0.3, gamma: [0.7, 1.5], noise: 0.05}},
  unlabelled_batch: 10, weight: 0.1, ramp_up: 0.4, start: 0.03333333333333333, momentum: 0.99,
  statistics: copied, noise: 0.1, noise_limit: 0.2, predict: student}
uncertainty-mean-teacher 3: {gradient_clip: 0.0, strategy: uncertainty-mean-teacher, network: {}, labels: 2,
  validation: 0, draw: 0, batch: 10, loss: dice+ce, evaluate_every: 50, augmentation: {spatial: {rotation: 30.0,
  scale: [0.8, 1.3], anisotropy: 0.1, shift: 0.15, elastic: 2.5}, intensity: {brightness: 0.2, contrast: 0.3, gamma:
  [0.7, 1.5], noise: 0.05}}, unlabelled_batch: 10, weight: 0.1, ramp_up: 0.4, momentum: 0.99,
  statistics: copied, noise: 0.1, noise_limit: 0.2, passes: 8, passes_at_once: 2, dropout: 0.1, classes: all, predict:
  student}
ict 2: {gradient_clip: 0.0, strategy: ict, network: {}, labels: 2, validation: 0, draw: 0, batch: 10, loss: dice+ce,
  evaluate_every: 50, augmentation: {spatial: {rotation: 30.0, scale: [0.8, 1.3], anisotropy: 0.1, shift: 0.15,
  elastic: 2.5}, intensity: {brightness: 0.2, contrast: 0.3, gamma: [0.7, 1.5], noise: 0.05}}, unlabelled_batch: 10,
  weight: 0.1, ramp_up: 0.4, alpha: 0.2, momentum: 0.99, statistics: copied, predict: student}
fixmatch 1: {gradient_clip: 0.0, strategy: fixmatch, network: {}, labels: 2, validation: 0, draw: 0, batch: 10, loss:
  dice+ce, evaluate_every: 50, augmentation: {spatial: {rotation: 30.0, scale: [0.8, 1.3], anisotropy: 0.1, shift:
  0.15, elastic: 2.5}, intensity: {brightness: 0.2, contrast: 0.3, gamma: [0.7, 1.5], noise: 0.05}}, unlabelled_batch:
  10, weight: 1.0, ramp_up: 0.0, threshold: 0.95, weak: {spatial: {rotation: 20.0, scale: [0.9, 1.1],
  shift: 0.05}, intensity: {brightness: 0.05, contrast: 0.1}}, strong: {brightness: 0.3, contrast: 0.5, gamma: [0.5,
  2.0], blur: 2.0, probability: 0.8}, cutmix: 0.5}
unimatch 1: {gradient_clip: 0.0, strategy: unimatch, network: {}, labels: 2, validation: 0, draw: 0, batch: 10, loss:
  dice+ce, evaluate_every: 50, augmentation: {spatial: {rotation: 30.0, scale: [0.8, 1.3], anisotropy: 0.1, shift:
  0.15, elastic: 2.5}, intensity: {brightness: 0.2, contrast: 0.3, gamma: [0.7, 1.5], noise: 0.05}}, unlabelled_batch:
  10, weight: 1.0, ramp_up: 0.0, threshold: 0.95, mu: 0.5, lambda_fp: 0.5, dropout: 0.5, weak:
  {spatial: {rotation: 20.0, scale: [0.9, 1.1], shift: 0.05}, intensity: {brightness: 0.05, contrast: 0.1}}, strong:
  {brightness: 0.3, contrast: 0.5, gamma: [0.5, 2.0], blur: 2.0, probability: 0.8}, cutmix: 0.5}
bcp 2: {gradient_clip: 0.0, strategy: bcp, network: {}, labels: 2, validation: 0, draw: 0, batch: 10, loss: dice+ce,
  evaluate_every: 50, augmentation: {spatial: {rotation: 30.0, scale: [0.8, 1.3], anisotropy: 0.1, shift: 0.15,
  elastic: 2.5}, intensity: {brightness: 0.2, contrast: 0.3, gamma: [0.7, 1.5], noise: 0.05}}, unlabelled_batch: 10,
  weight: 0.5, ramp_up: 0.0, pretraining: 0.25, beta: 0.6666666666666666, place: random, largest:
  true, momentum: 0.99, statistics: copied, predict: student}
mixup 1: {gradient_clip: 0.0, strategy: mixup, network: {}, labels: 2, validation: 0, draw: 0, batch: 10, loss: dice+ce,
  evaluate_every: 50, augmentation: {spatial: {rotation: 30.0, scale: [0.8, 1.3], anisotropy: 0.1, shift: 0.15,
  elastic: 2.5}, intensity: {brightness: 0.2, contrast: 0.3, gamma: [0.7, 1.5], noise: 0.05}}, alpha: 0.1}
self-training 2: {gradient_clip: 0.0, strategy: self-training, network: {}, labels: 2, validation: 0, draw: 0, batch:
  10, loss: dice+ce, evaluate_every: 50, augmentation: {spatial: {rotation: 30.0, scale: [0.8, 1.3], anisotropy: 0.1,
  shift: 0.15, elastic: 2.5}, intensity: {brightness: 0.2, contrast: 0.3, gamma: [0.7, 1.5], noise: 0.05}},
  unlabelled_batch: 10, weight: 1.0, ramp_up: 0.0, rounds: 3, first: 0.4, retrain: reached, confidence: 0.0,
  class_balanced: 0.0, masks: true}
supervised 1: {strategy: supervised, network: {}, labels: 2, validation: 0, draw: 0, batch: 10, loss: dice+ce,
  evaluate_every: 50, augmentation: {spatial: {rotation: 30.0, scale: [0.8, 1.3], anisotropy: 0.1, shift: 0.15,
  elastic: 2.5}, intensity: {brightness: 0.2, contrast: 0.3, gamma: [0.7, 1.5], noise: 0.05}}}
task-augmentation 1: {gradient_clip: 0.0, strategy: task-augmentation, network: {}, labels: 2, validation: 0, draw: 0,
  batch: 10, loss: dice+ce, evaluate_every: 50, augmentation: {spatial: {rotation: 30.0, scale: [0.8, 1.3], anisotropy:
  0.1, shift: 0.15, elastic: 2.5}, intensity: {brightness: 0.2, contrast: 0.3, gamma: [0.7, 1.5], noise: 0.05}},
  unlabelled_batch: 10, final: 0.5, alone: 0.04, lambda_dsc: 1.0, lambda_adv: 1.0, lambda_l1: 0.001, reach:
  0.25, width: 16, mixup: 0.0}
unet 1: {name: unet, widths: [16, 32, 64, 128, 128, 128]}
pcl-unet 1: {name: pcl-unet, widths: [32, 64, 128, 256, 512], center_norm: false}
attention-unet 1: {name: attention-unet, widths: [64, 128, 256, 512, 1024]}
uctransnet 1: {name: uctransnet, widths: [64, 128, 256, 512, 512], depth: 4, heads: 4, positions: 14, dropout: 0.1}
bcdu-net 1: {name: bcdu-net, widths: [64, 128, 256, 512], dense: 3, dropout: 0.5}
resnet50-unet 1: {name: resnet50-unet, width: 64, decoder_widths: [256, 128, 64, 32, 16], up: nearest}
nnunet-plain 1: {name: nnunet-plain, widths: [32, 64, 128, 256, 512, 512], convolutions: 2, decoder_convolutions: 2}
nnunet-residual 1: {name: nnunet-residual, widths: [32, 64, 128, 256, 512, 512], depths: [1, 3, 4, 6],
  decoder_convolutions: 1}
spatial 2: {rotation: 0.0, scale: [1.0, 1.0], anisotropy: 0.0, shift: 0.0, crop: [1.0, 1.0], flip: [0.0, 0.0],
  elastic: 0.0, elastic_grid: 6, probability: 1.0}
intensity 2: {brightness: 0.0, contrast: 0.0, gamma: [1.0, 1.0], noise: 0.0, blur: 0.0, clip: null, probability: 1.0}
preprocessing 1: {n4: false, intensity: percentile, percentiles: [1.0, 99.0], clip: true, window: null, slice_axis:
  auto, spacing: null, spacing_known: true, field: null}
""")

TOLERANCE = 1e-3  # relative: other processors and versions of PyTorch round in other ways
# Learning rates at which three steps tell one optimiser from another, and the widths of small heads.
QUICK = {"max_iterations": 3, "warmup_iterations": 2, "learning_rate": 0.005}
PCL = {"method": "pcl", "batch": 8, "outputs": 8}
GCL = {"method": "gcl", "volumes": 2, "hidden": 16, "outputs": 8, "local_batch": 3, "blocks": 1}
# What is next to 0 (biases before a batch norm) Adam moves as far as anything else, to where rounding says; the second
# stage, where batch norms no longer take this away, would show it.
SGD = {"optimizer": "sgd", "learning_rate": 0.01}
HALVES = {"labels": 2, "batch": 4, "unlabelled_batch": 4, "weight": 1.0, "ramp_up": 0.0}
TRAININGS: dict[str, dict[str, Any]] = {
    "pcl": PCL,
    "pcl, partitions": {**PCL, "labels": "partition", "head": "flat", "hidden": 16, "scale": "none"},
    "gcl": {**GCL, **SGD},
    "gcl, G^R and L^D": {**GCL, **SGD, "strategy": "random", "batch": 6, "local": "D", "kernel": 1, "regions": 9},
    "gcl, G^D-": {**GCL, "strategy": "D-", "local": "none", "schedule": "cosine"},
    "simclr": {"method": "simclr", "batch": 6, "outputs": 8},
    "moco": {"method": "moco", "batch": 6, "queue": 12, "outputs": 8, "momentum": 0.9},
    "byol": {"method": "byol", "batch": 6, "hidden": 16, "outputs": 8},
    "simsiam": {"method": "simsiam", "batch": 6, "hidden": 8, "outputs": 16},
    "simtriplet": {"method": "simtriplet", "batch": 6, "hidden": 8, "outputs": 16},
    "swav": {"method": "swav", "batch": 6, "prototypes": 8, "hidden": 16, "outputs": 8, "frozen": 1},
    "dino": {"method": "dino", "batch": 6, "hidden": 16, "bottleneck": 8, "outputs": 12, "frozen": 1},
    "ideal": {"method": "ideal", "batch": 4, "outputs": 8, "correspondence": "geometry"},
    "pgl": {"method": "pgl", "batch": 4, "outputs": 8},
    "jcl": {"method": "jcl", "batch": 4, "blocks": 1, "outputs": 8, **SGD},
    "pixel-global": {"method": "pixel-global", "batch": 4, "outputs": 8, "pixel_outputs": 6, "passes": 2},
    "rotation": {"method": "rotation", "batch": 3},
    "inpainting": {"method": "inpainting", "batch": 6},
    "context-restoration": {"method": "context-restoration", "batch": 6},
    "label-efficient": {"method": "label-efficient", "batch": 6, "outputs": 8, "local_batch": 2, "hidden": 8, **SGD},
    "cps": {"strategy": "cps", **HALVES, **SGD},
    "cross-consistency": {"strategy": "cross-consistency", **HALVES, **SGD},
    "mc-net": {"strategy": "mc-net", **HALVES, **SGD},
    "adversarial": {"strategy": "adversarial", "batch": 6, "unlabelled_batch": 4, "width": 4, "dropout": 0.0},
    "mean-teacher": {"strategy": "mean-teacher", **HALVES, **SGD, "weight": 30},
    "uncertainty-mean-teacher": {"strategy": "uncertainty-mean-teacher", **HALVES, **SGD, "weight": 30, "passes": 3},
    "ict": {"strategy": "ict", **HALVES, **SGD, "weight": 30},
    "fixmatch": {"strategy": "fixmatch", **HALVES, **SGD, "threshold": 0.5},
    "unimatch": {"strategy": "unimatch", **HALVES, **SGD, "threshold": 0.5},
    "bcp": {"strategy": "bcp", **HALVES, **SGD, "pretraining": 0.34},
    "mixup": {"strategy": "mixup", "labels": 2, "batch": 6, "alpha": 1.0, **SGD},
    "self-training": {"strategy": "self-training", **HALVES, **SGD},
    "supervised": {"strategy": "supervised", "labels": 2, "batch": 6},
    "supervised, Dice": {**SGD, "learning_rate": 0.1, "strategy": "supervised", "labels": "all", "loss": "dice"},
    "task-augmentation": {**SGD, "strategy": "task-augmentation", "batch": 6, "unlabelled_batch": 4, "width": 2},
}
SPLIT = Split(0, ("case0", "case1", "case2", "case3"), ("case4",), ("case5",))


def compare(what: str, versions: Mapping[str, int], values: Sequence[float]) -> None:
    """Fail if `what` is not what was recorded of these versions."""
    key = f"{what} {sum(versions.values())}"
    now = [float(f"{value:.5g}") for value in values]
    made_by = ", ".join(f"{name} {version}" for name, version in versions.items())
    assert key in RECORDED, f"{what} is not recorded of these versions ({made_by}): record\n{key}: {now}"
    same = len(now) == len(RECORDED[key]) and np.allclose(now, RECORDED[key], rtol=TOLERANCE, atol=TOLERANCE / 10)
    assert same, (
        f"The results of {what} have changed, from {RECORDED[key]} to {now}, so finished trainings would be taken for "
        f"what they are not: if this is meant, raise the VERSION (or version) of the component that changed, one of "
        f"{made_by}, and record the new values."
    )


def moments(x: Tensor) -> list[float]:
    """Mean, deviation, and how far values lie to the right and to the bottom: `(..., H, W)`."""
    x = x.double()
    down, right = (torch.linspace(0, 1, side, dtype=x.dtype) for side in x.shape[-2:])
    return [float(m) for m in (x.mean(), x.std(), (x * right).mean(), (x * down[:, None]).mean())]


def test_every_component_is_recorded() -> None:
    assert {name.partition(",")[0] for name in TRAININGS} == {*METHODS, *STRATEGIES}
    assert TINY.keys() == NETWORKS.keys()


@pytest.mark.parametrize("name", TRAININGS)
def test_three_steps_of_training(name: str, store: Store, cheap: dict[str, Any], tmp_path: Path) -> None:
    settings = {**cheap, **QUICK, **TRAININGS[name]}
    work: Any = pretrain if "method" in settings else finetune
    work(store, tmp_path, settings, split=SPLIT)
    values = []
    for log in sorted(tmp_path.glob("**/metrics.jsonl")):
        lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        assert [line["iteration"] for line in lines] == [1, 3]
        values += [line["loss"] for line in lines]
    # Masks and figures have rows of their own.
    parts = {key: v for key, v in settings_of(tmp_path)["versions"].items() if key not in ("inference", "metrics")}
    compare(name, {**parts, "preprocessing": preparing.VERSION}, values)


def waves(*shape: int) -> Tensor:
    """Something smooth with values about 0 to 1, `shape`, in float32: no random numbers, no files."""
    places = torch.meshgrid(*(torch.linspace(0, 1, side, dtype=torch.float64) for side in shape), indexing="ij")
    phase = sum((2.3 + 1.7 * k) * place for k, place in enumerate(places))
    return (0.5 + 0.4 * torch.sin(phase) + 0.2 * places[-1] * places[-2]).float()


def ball(shape: tuple[int, int, int], radius: float, right: float = 0.0) -> Any:
    """A label map `(z, y, x)`: a ball (1) with a core (2), its centre a little off the middle."""
    z, y, x = np.mgrid[tuple(slice(-1, 1, side * 1j) for side in shape)]
    distance = np.sqrt(z**2 + (y - 0.1) ** 2 + (x - right) ** 2)
    return (distance < radius).astype(np.uint8) + (distance < radius / 2)


GEOMETRY = Geometry((30, 26, 7), (1.4, 1.4, 6.0))
LABELS = {"background": 0, "shell": 1, "core": 2}


def plan_of(**options: Any) -> Plan:
    whole = PreprocessOptions(**{"size": (24, 24), **options})
    return Plan(options=whole, channels=1, labels=LABELS, slice_axis="z", axes=None)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("slices", {}),
        ("slices, resampled", {"spacing": (1.1, 1.3), "field": (28, 32), "intensity": "zscore", "clip": False}),
        ("slices, window", {"intensity": "window", "window": (300, 900), "field": (20, 40)}),
    ],
)
def test_slices_of_a_volume_and_the_way_back(name: str, options: dict[str, Any]) -> None:
    plan = plan_of(**options)
    prepared = prepare(Volume(1000 * waves(1, 7, 26, 30).numpy(), GEOMETRY), plan)
    labels = prepare_labels(Volume(ball((7, 26, 30), 0.8)[None], GEOMETRY), prepared.undo, plan)
    # Classes that weigh differently, because no rounding may decide between two that are equal.
    back = restore([(torch.eye(3) * torch.tensor([1, 1.13, 1.27]))[labels.long()].movedim(-1, 1)], prepared.undo)
    values = [*moments(prepared.images), *moments(labels), *moments(torch.from_numpy(back))]
    compare(name, {"preprocessing": preparing.VERSION}, values)


def test_a_view() -> None:
    options = ViewOptions(
        spatial=SpatialOptions(
            rotation=40, scale=(0.8, 1.3), anisotropy=0.2, shift=0.1, crop=(0.6, 0.9), flip=(0.5, 0.5), elastic=2.0
        ),
        intensity=IntensityOptions(
            brightness=0.2, contrast=0.3, gamma=(0.7, 1.5), noise=0.05, blur=1.0, clip=(0, 1.5), probability=0.9
        ),
    )
    drawn = draw_view(options, 6, (24, 28), generator(1, "view"))
    labels = torch.from_numpy(ball((6, 24, 28), 0.8)).long()
    values = [*moments(drawn.image(waves(6, 2, 24, 28))), *moments(drawn.labels(labels))]
    compare("view", {"views": view.VERSION}, values)


TINY: dict[str, dict[str, Any]] = {
    "unet": {"widths": [4, 8, 8]},
    "pcl-unet": {"widths": [4, 8, 8]},
    "attention-unet": {"widths": [4, 8, 8]},
    "uctransnet": {"widths": [4, 8, 8], "depth": 2, "heads": 2, "positions": 4},
    "bcdu-net": {"widths": [4, 8, 8]},
    "resnet50-unet": {"width": 2, "decoder_widths": [8, 8, 8, 4, 4]},
    "nnunet-plain": {"widths": [4, 8, 8]},
    "nnunet-residual": {"widths": [4, 8, 8], "depths": [1, 2]},
}


@pytest.mark.parametrize("name", TINY)
def test_a_prediction(name: str) -> None:
    torch.manual_seed(2)
    network = build(network_options({"name": name, **TINY[name]}), 1, 3)
    side = max(24, network.multiple)
    images = waves(7, 1, side, side)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = 1.0
    network(images)  # the statistics of its batch norms, so that classes differ
    (probabilities,) = slice_probabilities(folded(network), images, torch.device("cpu"))
    undo = prepare(Volume(waves(1, 7, 26, 30).numpy(), GEOMETRY), plan_of(size=(side, side))).undo
    mask = torch.from_numpy(restore([probabilities], undo))
    values = [*moments(probabilities[:, 0]), *moments(probabilities[:, 1]), *moments(mask)]
    versions = {name: NETWORKS[name].version, "inference": inference.VERSION, "preprocessing": preparing.VERSION}
    compare(f"prediction, {name}", versions, values)


def test_figures_of_a_prediction() -> None:
    truth, prediction = ball((7, 26, 30), 0.8), ball((7, 26, 30), 0.7, right=0.15)
    rows = case_metrics(prediction, truth, {"shell": 1, "core": 2, "absent": 3}, (1.4, 1.4, 6.0), tolerance=2.0)
    missed = case_metrics(0 * prediction, truth, {"core": 2}, (1.4, 1.4, 6.0))
    values = [float(row[metric]) for row in [*rows, *missed] for metric in METRICS]
    compare("metrics", {"metrics": metrics.VERSION}, values)


OPTIONS: dict[str, tuple[type[BaseModel], int]] = {
    "engine": (TrainingOptions, engine.VERSION),
    **{name: (method.options, method.version) for name, method in METHODS.items()},
    **{name: (strategy.options, strategy.version) for name, strategy in STRATEGIES.items()},
    **{name: (network.options, network.version) for name, network in NETWORKS.items()},
    "spatial": (SpatialOptions, view.VERSION),
    "intensity": (IntensityOptions, view.VERSION),
    "preprocessing": (PreprocessOptions, preparing.VERSION),
}


def defaults(kind: type[BaseModel]) -> dict[str, Any]:
    """Every default as a recipe would say it; of options within options what is not at their own defaults."""
    fields = {
        name: field
        for name, field in kind.model_fields.items()
        if name not in ("device", "log") and not field.exclude  # as identities leave them out
    }
    found = {name: field.default for name, field in fields.items() if not field.is_required()}
    plain: dict[str, Any] = json.loads(
        json.dumps(found, default=lambda options: options.model_dump(exclude_defaults=True))
    )
    return plain


@pytest.mark.parametrize("name", OPTIONS)
def test_defaults_have_versions_too(name: str) -> None:
    """Identities leave out what is at its default, so that a key may be added; so no default may change silently."""
    kind, version = OPTIONS[name]
    now, base = defaults(kind), {}
    if issubclass(kind, TrainingOptions) and name != "engine":
        base = DEFAULTS.get(f"engine {engine.VERSION}", {})
    own = json.dumps({key: value for key, value in now.items() if (key, value) not in base.items()})
    key = f"{name} {version}"
    assert key in DEFAULTS, f"The defaults of {name} are not recorded of this version: record\n{key}: {own}"
    recorded = base | DEFAULTS[key]
    changed = {key: now.get(key, "gone") for key in recorded if now.get(key, "gone") != recorded[key]}
    assert not changed, (
        f"Defaults of {name} have changed: {changed}, so finished trainings that had the old ones would be taken for "
        f"new ones: if this is meant, raise its version and record\n{name} {version + 1}: {own}"
    )
