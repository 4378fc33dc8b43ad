import logging, sys, time
from pathlib import Path
import numpy as np, torch
from concurrent.futures import ProcessPoolExecutor
from diffedit_ray.demo.scenes import draw_scene
from diffedit_ray.demo.training.autoencoder import train_autoencoder
logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
def px(s): return draw_scene(s).image
def meta(s): x=draw_scene(s); return x.kinds,x.background
if __name__=="__main__":
    torch.set_num_threads(1)
    w=Path("/work/train"); w.mkdir(exist_ok=True)
    f=w/"images.npy"
    if not f.exists():
        with ProcessPoolExecutor(2) as p: a=np.stack(list(p.map(px, range(1_000_000,1_000_000+int(sys.argv[2])), chunksize=64)))
        np.save(f,a)
    im=torch.from_numpy(np.load(f)).permute(0,3,1,2)
    logging.info("images")
    
    if sys.argv[3]=="vae": train_autoencoder(im[:-256],im[-256:],workdir=w,seed=0,steps=int(sys.argv[1]),batch=6,device=torch.device("cpu"))
    else:
        import torch.nn.functional as F
        from diffedit_ray.demo.training.autoencoder import patch_components
        from diffedit_ray.demo.training.denoiser import train_denoiser
        wt,b=patch_components(im[:512].float()/127.5-1)
        lat=torch.cat([F.conv2d(x.float()/127.5-1,wt,b,stride=8) for x in im[:-256].split(256)])
        logging.info("std %s rms %.3f", [round(float(q),2) for q in lat.std((0,2,3))], lat.square().mean().sqrt())
        lat=lat/lat.square().mean().sqrt()
        sc=[(x.kinds,x.background) for x in map(draw_scene, range(0))]
        f=w/"scenes.pt"
        import pickle
        if not f.exists():
            with ProcessPoolExecutor(2) as p: pickle.dump(list(p.map(meta, range(1_000_000,1_000_000+len(im)), chunksize=64)),f.open("wb"))
        sc=pickle.load(f.open("rb"))[:len(lat)]
        train_denoiser(lat,sc,workdir=w,seed=0,steps=int(sys.argv[1]),batch=32,device=torch.device("cpu"))
