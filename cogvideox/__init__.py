"""Text to video with CogVideoX on TPUs: what the scripts at the root share.

Each room imports those below it and never one above:

    inspection  what inspect_tensors.py and `utils.py status` say of files
    run         one execution of a stage: hosts, plans, jobs, compilation, profiles
    cli         what a user types and sees: options, report, progress
    files       what lies on disk: names, schemas, tensors, atomic writes, checkpoints
    models      arrays in, arrays out: transformer and decoder; it knows of no file and no option
    errors, signals, defaults, packages, versions, hlo_schedule   the ground: they import nothing of ours
"""

from cogvideox.packages import end_without_base

end_without_base()
