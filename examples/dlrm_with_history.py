"""The DLRM of `dlrm_plain.py` with histories: the same script, loader, loop and loss.

torchrun --standalone --nproc_per_node 2 examples/dlrm_with_history.py --epochs 2
"""

import argparse
import os
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.optim import _apply_optimizer_in_backward as apply_optimizer_in_backward
from torchmetrics.classification import BinaryAUROC
from torchrec import EmbeddingBagCollection, EmbeddingBagConfig, EmbeddingCollection, EmbeddingConfig
from torchrec.datasets.utils import Batch
from torchrec.distributed import DistributedModelParallel
from torchrec.distributed.embedding import EmbeddingCollectionSharder
from torchrec.distributed.embeddingbag import EmbeddingBagCollectionSharder
from torchrec.distributed.planner import EmbeddingShardingPlanner, Topology
from torchrec.distributed.train_pipeline import TrainPipelineSparseDist
from torchrec.models.dlrm import DLRM, DLRM_DCN, DLRMTrain
from torchrec.optim.keyed import CombinedOptimizer, KeyedOptimizerWrapper
from torchrec.optim.optimizers import in_backward_optimizer_filter
from torchrec.optim.rowwise_adagrad import RowWiseAdagrad

from ssd_torchrec.data.batches import Share
from ssd_torchrec.data.ranking.batches import RankingBatches
from ssd_torchrec.data.ranking.clicks import ClicksConfig, generate_clicks
from ssd_torchrec.data.ranking.folder import RankingPart
from ssd_torchrec.data.ranking.schema import RankingMeta
from ssd_torchrec.encoders.tim4rec import TiM4Rec, TiM4RecConfig
from ssd_torchrec.models.dlrm import plug_into_dlrm
from ssd_torchrec.models.history import History


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=2, help="passes over the training part")
    parser.add_argument("--batch_size", type=int, default=256, help="rows of a rank's batch")
    parser.add_argument("--limit_train_batches", type=int, default=None, help="batches of an epoch at most")
    parser.add_argument("--embedding_dim", type=int, default=16, help="width of all tables")
    parser.add_argument("--dense_arch_layer_sizes", type=str, default="64,16", help="the last is embedding_dim")
    parser.add_argument("--over_arch_layer_sizes", type=str, default="64,32,1", help="the last is the logit")
    parser.add_argument("--interaction_type", choices=["original", "dcn"], default="original")
    parser.add_argument("--dcn_num_layers", type=int, default=2)
    parser.add_argument("--dcn_low_rank_dim", type=int, default=16)
    parser.add_argument("--learning_rate", type=float, default=4e-3)
    parser.add_argument("--table_learning_rate", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--data", type=Path, default=Path("runs/data/clicks"), help="ranking data set; generated if absent"
    )
    return parser.parse_args()


def batches(args: argparse.Namespace, part: str, epoch: int) -> Iterator[Batch]:
    """Your loader: this rank's batches of a part."""
    share = Share(rank=dist.get_rank(), world_size=dist.get_world_size())
    loader = RankingBatches(RankingPart(args.data, part), args.batch_size * share.world_size, share, args.seed)
    of_part = loader.epoch(epoch) if part == "train" else loader.in_order()
    for number, batch in enumerate(of_part):
        if part == "train" and number == args.limit_train_batches:
            return
        yield batch


def build(args: argparse.Namespace, meta: RankingMeta) -> DLRM:
    tables = [
        EmbeddingBagConfig(
            name=f"t_{name}", embedding_dim=args.embedding_dim, num_embeddings=rows, feature_names=[name]
        )
        for name, rows in meta.categorical.items()
    ]
    shared = {
        "embedding_bag_collection": EmbeddingBagCollection(tables=tables, device=torch.device("meta")),
        "dense_in_features": len(meta.dense),
        "dense_arch_layer_sizes": [int(size) for size in args.dense_arch_layer_sizes.split(",")],
        "over_arch_layer_sizes": [int(size) for size in args.over_arch_layer_sizes.split(",")],
    }
    if args.interaction_type == "dcn":
        return DLRM_DCN(**shared, dcn_num_layers=args.dcn_num_layers, dcn_low_rank_dim=args.dcn_low_rank_dim)
    return DLRM(**shared)


def evaluate(model: torch.nn.Module, args: argparse.Namespace, part: str, device: torch.device) -> float:
    auroc = BinaryAUROC(thresholds=None).to(device)
    model.eval()
    with torch.no_grad():
        for batch in batches(args, part, 0):
            _, (_, logits, labels) = model(batch.to(device))
            real = labels >= 0  # a rank without a row of the last batch has one that stands for none
            auroc.update(torch.sigmoid(logits[real]), labels[real].int())
    model.train()
    return auroc.compute().item()


def main() -> None:
    args = parse_args()
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    if dist.get_rank() == 0 and not args.data.exists():
        generate_clicks(ClicksConfig(), args.data)
    dist.barrier()
    torch.manual_seed(args.seed)
    meta = RankingMeta.read(args.data)
    dlrm = build(args, meta)
    items = EmbeddingConfig(
        name="t_clicked",
        embedding_dim=args.embedding_dim,
        num_embeddings=meta.histories["clicked"],
        feature_names=["clicked"],
    )
    collection = EmbeddingCollection(tables=[items], device=torch.device("meta"))
    encoder = TiM4Rec(TiM4RecConfig(width=args.embedding_dim, layers=1, head_width=8, state=16))
    plug_into_dlrm(dlrm, collection, encoder, History(item_key="clicked", timestamp_key="clicked_at"))
    train_model = DLRMTrain(dlrm)
    tables = [p for name, p in train_model.named_parameters() if "embedding" in name]
    apply_optimizer_in_backward(RowWiseAdagrad, tables, {"lr": args.table_learning_rate})
    sharders = [EmbeddingBagCollectionSharder(), EmbeddingCollectionSharder()]
    planner = EmbeddingShardingPlanner(
        topology=Topology(
            world_size=dist.get_world_size(),
            local_world_size=int(os.environ["LOCAL_WORLD_SIZE"]),
            compute_device=device.type,
        ),
        batch_size=args.batch_size,
    )
    plan = planner.collective_plan(train_model, sharders, dist.GroupMember.WORLD)
    model = DistributedModelParallel(train_model, device=device, plan=plan, sharders=sharders)
    dense = dict(in_backward_optimizer_filter(model.named_parameters()))
    dense_optimizer = KeyedOptimizerWrapper(dense, lambda params: torch.optim.Adam(params, lr=args.learning_rate))
    optimizer = CombinedOptimizer([model.fused_optimizer, dense_optimizer])
    for epoch in range(args.epochs):
        pipeline = TrainPipelineSparseDist(model, optimizer, device)
        feed = batches(args, "train", epoch)
        while True:
            try:
                pipeline.progress(feed)
            except StopIteration:
                break
        pipeline.detach()
        auc = evaluate(model, args, "valid", device)
        if dist.get_rank() == 0:
            print(f"epoch {epoch}: validation AUC {auc:.4f}")
    auc = evaluate(model, args, "test", device)
    if dist.get_rank() == 0:
        print(f"test AUC {auc:.4f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
