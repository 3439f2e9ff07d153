# What is built, and how, as $preset says; sourced by build_tiny.sh and check_seed.sh.
case $preset in
    tiny) length=4096 require=0.95 rows=512 documents=64 recipe=(--window 64 --ratio 8 --steps 600 --batch 16 --micro-batch 16 --lr 2e-4) ;;
    smoke) length=256 require=0.8 rows=512 documents=32 recipe=(--window 16 --ratio 4 --steps 200 --batch 8 --micro-batch 8 --lr 5e-4) ;;
    *) echo "preset $preset is neither tiny nor smoke" >&2; exit 2 ;;
esac
recipe+=(--length "$length" --merge)
