package sources

import (
	"path/filepath"
	"strconv"
	"testing"

	"github.com/stretchr/testify/require"
)

// BenchmarkFile is what a read and a write of what is in the page cache cost.
func BenchmarkFile(b *testing.B) {
	for name, dir := range map[string]string{"disk": b.TempDir(), "memory": "/dev/shm"} {
		path := filepath.Join(dir, "silo-nbd-bench-disk")
		f, err := OpenFile(path, FileOptions{Create: true, Size: 16 << 20})
		require.NoError(b, err)
		defer removeOwn(path, f.file)
		_, err = f.WriteAt(make([]byte, 16<<20), 0)
		require.NoError(b, err)
		for _, size := range []int{4 << 10, 64 << 10, 1 << 20} {
			p := make([]byte, size)
			for op, do := range map[string]func([]byte, int64) (int, error){"read": f.ReadAt, "write": f.WriteAt} {
				b.Run(name+"/"+op+"/"+strconv.Itoa(size>>10)+"KiB", func(b *testing.B) {
					b.SetBytes(int64(size))
					for i := 0; b.Loop(); i++ {
						if _, err := do(p, int64(i*size)%(16<<20)); err != nil {
							b.Fatal(err)
						}
					}
				})
			}
		}
	}
}
