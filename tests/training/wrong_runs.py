"""Overrides with which the tiny run cannot train, and a part of the message that says why."""

from __future__ import annotations

WRONG: dict[str, list[str]] = {
    # arguments that transformers refuses
    "trainer.save_steps = 2, trainer.eval_steps = 3 with load_best_model_at_end: ": [
        "trainer.load_best_model_at_end=true",
        "trainer.eval_steps=3",
    ],
    "trainer.save_strategy = ": ["trainer.load_best_model_at_end=true", "trainer.save_strategy=no"],
    "trainer.logging_steps = 1.5": ["trainer.logging_steps=1.5"],
    "trainer.eval_steps = 2.5": ["trainer.eval_steps=2.5"],
    "trainer.torch_empty_cache_steps = 0": ["trainer.torch_empty_cache_steps=0"],
    "trainer.fp16_full_eval = True": ["trainer.fp16_full_eval=true", "trainer.bf16_full_eval=true"],
    "trainer.warmup_steps = -1": ["trainer.warmup_steps=-1"],
    "trainer.dataloader_prefetch_factor = 2": ["trainer.dataloader_prefetch_factor=2"],
    "trainer.lr_scheduler_type = 'greedy'": ["trainer.lr_scheduler_type=greedy", "trainer.eval_strategy=no"],
    "trainer.eval_strategy = 'stepz'": ["trainer.eval_strategy=stepz"],
    "trainer.hub_strategy = 'foo'": ["trainer.hub_strategy=foo"],
    "trainer.optim = 'foo'": ["trainer.optim=foo"],
    "trainer.accelerator_config = {'foo': 1}": ["trainer.accelerator_config={foo: 1}"],
    # arguments that fail later
    "trainer.lr_scheduler_kwargs = {} with lr_scheduler_type = 'cosine_with_min_lr'": [
        "trainer.lr_scheduler_type=cosine_with_min_lr"
    ],
    "num_decay_steps": ["trainer.lr_scheduler_type=warmup_stable_decay"],
    "it has no argument 'foo'": ["trainer.lr_scheduler_type=constant", "trainer.lr_scheduler_kwargs={foo: 1}"],
    "lr_end (1.0) must be smaller": [
        "trainer.lr_scheduler_type=polynomial",
        "trainer.lr_scheduler_kwargs={lr_end: 1.0}",
    ],
    "trainer.optim = 'lomo'": ["trainer.optim=lomo"],
    "momentum = 1.5: must be from 0 to below 1": ["trainer.optim=muon", "trainer.optim_args=momentum=1.5"],
    "Muon on the CPU cannot be balanced": [
        "trainer.optim=muon",
        "deepspeed.zero_optimization.offload_optimizer={device: cpu}",
    ],
    "so Muon would train nothing": ["trainer.optim=muon", "model.freeze=backbone"],
    "trainer.optim_args = 'foo'": ["trainer.optim_args=foo"],
    "Invalid beta": ["trainer.adam_beta1=2"],
    "trainer.ignore_data_skip = False": ["trainer.ignore_data_skip=false"],
    "trainer.metric_for_best_model = 'det_map5': no such metric; did you mean 'det_map50'": [
        "trainer.metric_for_best_model=det_map5"
    ],
    "trainer.load_best_model_at_end with save_only_model": [
        "trainer.load_best_model_at_end=true",
        "trainer.save_only_model=true",
    ],
    "trainer.report_to = 'foo'": ["trainer.report_to=foo"],
    "trainer.neftune_noise_alpha": ["trainer.neftune_noise_alpha=5"],
    "trainer.use_liger_kernel": ["trainer.use_liger_kernel=true"],
    "trainer.torch_compile_backend = 'foo'": ["trainer.torch_compile_backend=foo"],
    "trainer.seed = -1": ["trainer.seed=-1"],
    "trainer.dataloader_num_workers = -1": ["trainer.dataloader_num_workers=-1"],
    "trainer.eval_strategy = 'steps' without test data": [f"tasks.{name}.test=null" for name in ("det", "seg", "cls")],
    # the DeepSpeed configuration
    "deepspeed.train_batch_size = 8": ["deepspeed.train_batch_size=8"],
    "deepspeed.train_micro_batch_size_per_gpu = 3": ["deepspeed.train_micro_batch_size_per_gpu=3"],
    "deepspeed.gradient_accumulation_steps = 2": ["deepspeed.gradient_accumulation_steps=2"],
    "deepspeed.zero_optimization.stage = 4": ["deepspeed.zero_optimization.stage=4"],
    "deepspeed.zero_optimization.foo: DeepSpeed has no such key": ["deepspeed.zero_optimization.foo=1"],
    "NVMe offload": ["deepspeed.zero_optimization.offload_optimizer={device: nvme, nvme_path: /tmp}"],
    "ZenFlow": ["deepspeed.zero_optimization.zenflow={topk_ratio: 0.1}"],
    "DeepCompile": ["deepspeed.compile={deepcompile: true}"],
    'gradient_allreduce_op = "sum"': ["deepspeed.gradient_allreduce_op=sum"],
    "ds bf16.enabled=False": ["deepspeed.bf16={enabled: false}", "trainer.bf16=true"],
    # balancer, model, heads
    "norm = 'foo'": ["balancer.norm=foo"],
    "unknown weighting 'foo'": ["balancer.name=foo"],
    "did you mean 'max_norm'": ["balancer.max_norn=1"],
    "no weight for task 'cls'": ["balancer.name=static", "balancer.weights={det: 1, seg: 1}"],
    "add up to the 1 ranks": ["balancer.parallel=tasks", "balancer.groups={det: 5, seg: 1, cls: 1}"],
    "tasks.seg.head: unknown head 'foo'": ["tasks.seg.head=foo"],
    "unknown key 'foo'": ["tasks.seg.options.foo=1"],
    "'width' = 33: Input should be a multiple of 32": ["tasks.seg.head=mask2former", "tasks.seg.options={width: 33}"],
    "tasks.seg.image_size = [30, 30]: both sides must be multiples of 4": ["tasks.seg.image_size=30"],
    "tasks.cls.image_size = [32, 32]: both sides must be multiples of 5": ["model.backbone.config.patch_size=5"],
    "tasks.seg: its data has one class, 'thing', which a softmax gives the probability 1 in every pixel": [
        f"tasks.seg.{part}.{key}"
        for part in ("train", "test")
        for key in ("classes=[thing]", f"class_ids=[{list(range(11))}]")
    ],
    "deepspeed.activation_checkpointing (cpu_checkpointing) would have no effect": [
        "deepspeed.activation_checkpointing={cpu_checkpointing: true}"
    ],
    "task type 'segmentatoin'": ["tasks.seg.type=segmentatoin"],
    "hidden_size 32 must be a multiple of num_attention_heads (3)": ["model.backbone.config.num_attention_heads=3"],
    "unknown key 'depth'": ["model.backbone.config.depth=3"],
    "model.backbone.out_indices = [1, 9]": ["model.backbone.out_indices=[1,9]"],
    "model.backbone.checkpoint: /nowhere is no folder": [
        "model.backbone.checkpoint=/nowhere",
        "model.backbone.stem=patch",
    ],
    "tasks.cls.test_time": ["tasks.cls.test_time.flip=true"],
    "model.freeze = 9: the backbone has 2 layers": ["model.freeze=9"],
    "model.freeze = 7: the backbone has 2 layers": ["model.freeze=backbone", "model.thaw={2: 7}"],
    "'thaw' is set, but nothing is frozen": ["model.thaw={2: null}"],
    "from step 3 on 1 is frozen, which is not less than before": ["model.freeze=1", "model.thaw={3: 1}"],
    "model.thaw: step 4 is never reached: trainer.max_steps = 4": ["model.freeze=1", "model.thaw={4: null}"],
    # folders, callbacks, length
    "/nowhere holds no config.yaml": ["model.start_from=/nowhere"],
    "there is no checkpoint in": ["trainer.resume_from_checkpoint=true"],
    "callbacks.transformers.Nothing": ["callbacks=[transformers.Nothing]"],
    "callbacks.transformers.Trainer: it is no subclass": ["callbacks=[transformers.Trainer]"],
    "callbacks.transformers.EarlyStoppingCallback": ["callbacks=[{transformers.EarlyStoppingCallback: {foo: 1}}]"],
    "early_stopping: it needs evaluations": ["early_stopping={patience: 2}", "trainer.eval_strategy=no"],
    "epochs.dett: the run has no such task": ["epochs={dett: 2}"],
    "trainer.max_steps with epochs": ["epochs={det: 2}"],
    "there is no augmentation 'Foo'": ["tasks.cls.augment=[Foo]"],
}
