# Evaluation against the baseline (the same model, prompts and seeds without merging and caching), for
# `tools/test.py` and `python -m mmagic_tome test`. A config of this folder's neighbours, `*_eval.py`,
# shows how to add it to a model.
#
# The settings are in one dict because mmengine allows no key in two bases, and configs of MMagic with
# its runtime have `test_cfg`, `visualizer` and others already (`None` or for other models).
tome_eval = dict(
    default_scope="mmagic",
    test_dataloader=dict(
        batch_size=1,
        num_workers=0,
        sampler=dict(type="DefaultSampler", shuffle=False),
        dataset=dict(
            type="ToMePromptDataset",
            prompts=[
                "a red apple",
                "a sailboat at sunset",
                "a lighthouse on a cliff",
                "a cup of coffee",
            ],
        ),
    ),
    # Steps, guidance, size and inputs are those of `infer_cfg`, else the defaults of the model's class.
    # The time of each block and target goes to work_dirs/<config>/<time>/profile.json.
    test_cfg=dict(type="ToMeTestLoop", profile=True),
    test_evaluator=[
        dict(type="ToMeMetric", metric="psnr"),
        dict(type="ToMeMetric", metric="ssim"),
        dict(type="ToMeMetric", metric="latent_error"),
        dict(type="ToMeSeconds"),
    ],
    # Tables of what is merged and skipped.
    custom_hooks=[dict(type="ToMeHook")],
    # Images go to work_dirs/<config>/<time>/vis_data/vis_image.
    # For TensorBoard: --cfg-options "visualizer.vis_backends=[{'type':'TensorboardVisBackend'}]"
    visualizer=dict(type="Visualizer", vis_backends=[dict(type="LocalVisBackend")]),
    log_level="INFO",
)
