-- Recovery says that it will cancel a reference at the PSP before it does. A cancellation may arrive
-- late, when its recoverer has long been overtaken: whoever comes after must not take what the PSP
-- says before it for the outcome.

ALTER TABLE doubts ADD COLUMN IF NOT EXISTS cancel_begun boolean NOT NULL DEFAULT false;
