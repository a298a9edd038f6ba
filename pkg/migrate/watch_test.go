package migrate

import (
	"errors"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/silo-nbd/silo-nbd/pkg/storage"
	"github.com/silo-nbd/silo-nbd/pkg/storage/sources"
)

var errWritten = errors.New("it was written meanwhile")

// TestFrozenDiskThatIsWrittenIsNeverSaidToBeComplete: whenever it happens, the source
// ends with an error, soon, and the destination does not hear Completed (rule 3, faults
// F7 and A9, trap I7).
func TestFrozenDiskThatIsWrittenIsNeverSaidToBeComplete(t *testing.T) {
	const size = 4 << 20
	for when, arrange := range map[string]func(m *migration, write func()){
		"while it moves": func(_ *migration, write func()) {
			<-time.After(1500 * time.Millisecond)
			write()
		},
		"between connections": func(m *migration, write func()) {
			<-time.After(1500 * time.Millisecond)
			write()
			m.wires.cut()
		},
		"while nothing moves": func(m *migration, write func()) {
			m.src.Pause()
			<-time.After(time.Hour)
			write()
		},
		"as the last block goes":      nil,
		"before the first connection": nil,
	} {
		t.Run(when, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				store, _ := testDisk(t, size, 1)
				var written atomic.Bool
				var at atomic.Int64
				write := func() { written.Store(true); at.Store(time.Now().UnixNano()) }
				src := newSource(t, SourceOptions{BlockSize: 4096, Rate: 1 << 20, Listening: true}, SourceDisk{
					Name: "disk", Store: store, Changed: func() error {
						if written.Load() {
							return errWritten
						}
						return nil
					},
				})
				var wrote atomic.Int64
				dst := newDestination(t, DestinationOptions{Disks: 1, Listening: true}, func(n string, s uint64) storage.StorageProvider {
					return &flaky{sources.NewMemoryStorage(int(s)), func(op string, _ int64) error {
						if op == "write" && wrote.Add(1) == 3*size/4/4096 && when == "as the last block goes" {
							write()
						}
						return nil
					}}
				})
				if when == "before the first connection" {
					write()
				}
				m := migrate(t, src, dst, newWires())
				if arrange != nil {
					arrange(m, write)
				}
				err := <-m.errs
				require.ErrorIs(t, err, errWritten)
				require.LessOrEqual(t, time.Since(time.Unix(0, at.Load())), watchEvery)
				require.NotEqual(t, StateComplete, src.Status()[0].State)
				require.ErrorIs(t, src.Status()[0].Err, errWritten)
				m.stop()
				m.wg.Wait()
				for _, st := range dst.Status() {
					require.NotEqual(t, StateComplete, st.State)
				}
				require.NoError(t, dst.Close())
			})
		})
	}
}

// TestFrozenFileIsWatchedByItsStamp: the file is written through another descriptor,
// also with its modification time put back (trap I7).
func TestFrozenFileIsWatchedByItsStamp(t *testing.T) {
	for what, write := range map[string]func(t *testing.T, path string){
		"write": writeInto,
		"write, and the time put back": func(t *testing.T, path string) {
			was, err := os.Stat(path)
			require.NoError(t, err)
			writeInto(t, path)
			require.NoError(t, os.Chtimes(path, was.ModTime(), was.ModTime()))
		},
		"cut off and made longer again": func(t *testing.T, path string) {
			require.NoError(t, os.Truncate(path, 1<<20))
			require.NoError(t, os.Truncate(path, 4<<20))
		},
	} {
		t.Run(what, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "disk.raw")
			_, data := testDisk(t, 4<<20, 1)
			require.NoError(t, os.WriteFile(path, data, 0o600))
			file, err := sources.OpenFile(path, sources.FileOptions{ReadOnly: true})
			require.NoError(t, err)
			defer func() { require.NoError(t, file.Close()) }()
			was, err := file.Stamp()
			require.NoError(t, err)
			src := newSource(t, SourceOptions{Rate: 1 << 20, Listening: true}, SourceDisk{
				Name: "disk", Store: file, Changed: func() error {
					if now, err := file.Stamp(); err != nil || !was.Unchanged(now) {
						return errors.Join(errWritten, err)
					}
					return nil
				},
			})
			dst := newDestination(t, DestinationOptions{Disks: 1, Listening: true}, memory)
			m := migrate(t, src, dst, newWires())
			<-dst.ready
			write(t, path)
			require.ErrorIs(t, <-m.errs, errWritten)
			m.stop()
			m.wg.Wait()
			require.NotEqual(t, StateComplete, dst.Status()[0].State)
			require.NoError(t, dst.Close())
		})
	}
}

func writeInto(t *testing.T, path string) {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	require.NoError(t, err)
	_, err = f.WriteAt([]byte("another writer"), 3<<20)
	require.NoError(t, err)
	require.NoError(t, f.Close())
}
